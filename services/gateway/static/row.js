// A song in the list: what is said of it, its buttons, and following its events.

import { ask, follow, sentence } from "./api.js";
import { Entry, hooks, rows, search } from "./entry.js";
import * as player from "./player.js";
import { ENDED, FORMATS, clock, doing, exact, nameOf, notBefore, place, until } from "./words.js";

const FOLLOWED = 8; // songs with a socket of their own

/** A row of the list, which knows its song and keeps it up to date. */
export class Row extends Entry {
  constructor(song) {
    super(song, nameOf(song.request));
    this.stage = song.stage ?? null;
    const of = song.group ? ` · ${song.variant}` : "";
    this.part("h3").textContent = this.name + of;
    this.part(".reuse").onclick = () => this.reuse();
    this.part(".cancel").onclick = () => this.cancel();
    this.part(".join").onclick = () => player.playFromJoin(this.sound);
    this.offer(`/generate/${song.job_id}/result`, FORMATS, song.format);
    this.show();
  }

  get ended() {
    return ENDED.has(this.song.status);
  }

  get playable() {
    return this.song.status === "completed" || (!this.ended && this.song.playable_seconds > 0);
  }

  /** The song as the player takes it. */
  get sound() {
    const { job_id: id, status, duration, playable_seconds: playable, request } = this.song;
    const longest = request.max_duration_ms == null ? null : request.max_duration_ms / 1000;
    const place = `/generate/${id}`;
    return {
      id,
      name: this.name,
      status,
      playable,
      length: status === "completed" ? duration : longest,
      join: this.join,
      whole: status === "completed",
      urls: { file: `${place}/result`, stream: `${place}/stream`, peaks: `${place}/peaks`, state: `${place}/status` },
    };
  }

  /** The second at which it goes on from another song; null if it does not. */
  get join() {
    return this.song.parent ? this.song.parent.at_ms / 1000 : null;
  }

  /** What it goes on from: the name of a song or recording, or the id of one that is gone or is not loaded. */
  get origin() {
    const { job_id, recording_id } = this.song.parent ?? this.song.request.continue_from;
    return rows.get(job_id ?? recording_id)?.name ?? job_id ?? `recording ${recording_id}`;
  }

  get removal() {
    return `/generate/${this.song.job_id}?forget=true`;
  }

  /** Apply a state or an event. */
  update(state) {
    const known = { ...this.song };
    if (state.kind === "queued" || state.queue_position !== undefined) known.queue_position = state.queue_position;
    if (state.stage) this.stage = state.stage;
    for (const name of ["status", "not_before", "eta", "error", "duration", "playable_seconds", "completed_at", "seed", "format", "sample_rate"])
      if (state[name] !== undefined) known[name] = state[name];
    if (state.duration_s) known.duration = state.duration_s;
    if (state.request) [known.parent, known.children] = [state.parent, state.children]; // which events do not tell
    known.progress = Math.max(known.progress, state.progress);
    if (state.status === "failed" || state.status === "cancelled") known.progress = state.progress;
    this.song = known;
    this.show();
    player.follow(this.sound);
    if (!this.ended) this.watch();
  }

  show() {
    const { status, progress, request } = this.song;
    this.showState(status, doing(status, this.stage), progress, this.ended);
    const facts = [];
    if (status === "completed") facts.push(clock(this.song.duration), (this.song.format ?? request.format).toUpperCase());
    if (this.ended) facts.push(`seed ${this.song.seed ?? request.seed}`);
    if (request.tags) facts.push(request.tags.split(",").join(", "));
    if (!this.ended) {
      facts.length = 0;
      if (status === "queued" && this.song.queue_position != null) facts.push(place(this.song.queue_position));
      else if (status === "queued" && this.song.not_before) facts.push(notBefore(this.song.not_before));
      if (status !== "queued") facts.push(`${Math.round(progress)} %`);
      if (this.playable) facts.push(`${clock(this.song.playable_seconds)} can be heard`);
      if (this.song.eta && until(this.song.eta)) facts.push(until(this.song.eta));
    }
    this.part(".facts").textContent = facts.join(" · ");
    this.part(".play").hidden = this.ended && !this.playable;
    this.showJoin();
    this.part(".extend").hidden = status !== "completed";
    this.label();
    this.part(".menu").hidden = status !== "completed";
    this.part(".cancel").hidden = this.ended;
    this.part(".delete").hidden = !this.ended;
    if (status === "failed") this.complain(`${sentence(this.song.error ?? "no reason is known")} “Use again” tries it once more.`);
  }

  /** Show what it goes on from and when, and offer to play it from there. */
  showJoin() {
    const { parent, status, duration, playable_seconds: playable } = this.song;
    this.part(".origin").hidden = !parent;
    const heard = status === "completed" ? duration : playable;
    this.part(".join").hidden = !parent || !this.playable || heard <= this.join;
    if (!parent) return;
    const at = exact(parent.at_ms);
    const above = rows.get(parent.job_id ?? parent.recording_id);
    const words = `${this.origin} ${parent.exists} ${above ? "link" : ""}`;
    this.part(".join").textContent = `Play from ${clock(this.join)}`;
    this.part(".join").setAttribute("aria-label", `Play from ${clock(this.join)}: ${this.name}`);
    if (this.part(".origin").dataset.words === words) return;
    this.part(".origin").dataset.words = words;
    const name = document.createElement(above ? "button" : "span");
    if (above) [name.type, name.className, name.onclick] = ["button", "link", () => above.reveal()];
    name.textContent = this.origin;
    this.part(".origin").replaceChildren("Goes on from ", name, parent.exists ? ` at ${at}` : `, which is gone, at ${at}`);
  }

  /** Follow its events, if it plays or not too many songs are followed already. */
  watch(always = false) {
    const busy = [...rows.values()].filter((row) => row.stop).length;
    if (this.stop || this.ended || (busy >= FOLLOWED && !always)) return;
    this.stop = follow(
      this.song.job_id,
      (state) => this.update(state),
      () => {
        this.stop = null;
        hooks.ended(); // its length and so on are known now, and another song can be followed
      },
    );
  }

  reuse() {
    const { request } = this.song;
    hooks.reuse(request, request.continue_from && this.origin);
  }

  /** Go on from a second of it, or from its end. */
  goOn(seconds = this.song.duration) {
    const { job_id: id, request } = this.song;
    hooks.extend({ id, name: this.name, request }, this.moment(seconds));
  }

  async cancel() {
    this.part(".cancel").disabled = true;
    try {
      this.update({ ...(await ask(`/generate/${this.song.job_id}`, { method: "DELETE" })), progress: this.song.progress });
    } catch (error) {
      this.complain(error.message);
    }
    this.part(".cancel").disabled = false;
  }

  get matches() {
    const wanted = search.value.trim().toLowerCase();
    const { request } = this.song;
    return [this.name, request.lyrics, request.tags, this.song.job_id].some((text) => text.toLowerCase().includes(wanted));
  }
}
