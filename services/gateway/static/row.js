// A song in the list: what is said of it, its buttons, and following its events.

import { ask, follow, sentence } from "./api.js";
import { FRAME } from "./continuation.js";
import * as player from "./player.js";
import { ENDED, FORMATS, clock, doing, exact, nameOf, place, until } from "./words.js";

const FOLLOWED = 8; // songs with a socket of their own
const SURE_FOR = 4_000; // ms in which a second press deletes
const template = document.querySelector("#song");
const search = document.querySelector("#search");
export const rows = new Map(); // by id of the song
/** What the rest of the page does: fill the form from a song, look at a song that ended, close the gap of one that left. */
export const hooks = { reuse: () => {}, extend: () => {}, ended: () => {}, left: () => {} };

/** A row of the list, which knows its song and keeps it up to date. */
export class Row {
  constructor(song) {
    this.song = song;
    this.name = nameOf(song.request);
    this.stage = song.stage ?? null;
    this.plays = false; // the player has it, and does not pause
    this.item = template.content.cloneNode(true).querySelector("li");
    this.item.id = `song-${song.job_id}`;
    const of = song.group ? ` · ${song.variant}` : "";
    this.part("h3").textContent = this.name + of;
    this.part("progress").setAttribute("aria-label", `Progress of ${this.name}`);
    const acts = { play: "play", extend: "goOn", reuse: "reuse", cancel: "cancel", delete: "remove" };
    for (const [name, act] of Object.entries(acts)) {
      this.part(`.${name}`).onclick = () => this[act]();
      this.part(`.${name}`).setAttribute("aria-label", `${this.part(`.${name}`).textContent}: ${this.name}`);
    }
    this.part(".join").onclick = () => player.playFromJoin(this.sound);
    this.part(".menu summary").setAttribute("aria-label", `Download: ${this.name}`);
    this.part(".menu ul").append(...FORMATS.map((format) => this.link(format)));
    this.show();
  }

  part(selector) {
    return this.item.querySelector(selector);
  }

  link(format) {
    const item = document.createElement("li");
    const link = document.createElement("a");
    link.href = `/generate/${this.song.job_id}/result?format=${format}`;
    link.download = "";
    link.textContent = format.toUpperCase() + (format === this.song.format ? " (as made)" : "");
    link.onclick = () => {
      this.part(".menu").open = false; // braces: a handler that returns false stops the download
    };
    item.append(link);
    return item;
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
    return { id, name: this.name, status, playable, length: status === "completed" ? duration : longest, join: this.join };
  }

  /** The second at which it goes on from another song; null if it does not. */
  get join() {
    return this.song.parent ? this.song.parent.at_ms / 1000 : null;
  }

  /** What it goes on from: the name of a song, or the id of one that is gone or is not loaded. */
  get origin() {
    const { job_id, recording_id } = this.song.parent ?? this.song.request.continue_from;
    return rows.get(job_id)?.name ?? job_id ?? `recording ${recording_id}`;
  }

  /** Apply a state or an event. */
  update(state) {
    const known = { ...this.song };
    if (state.kind === "queued" || state.queue_position !== undefined) known.queue_position = state.queue_position;
    if (state.stage) this.stage = state.stage;
    for (const name of ["status", "eta", "error", "duration", "playable_seconds", "completed_at", "seed", "format", "sample_rate"])
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
    const word = doing(status, this.stage);
    if (this.part(".state").textContent !== word) this.part(".state").textContent = word; // screen readers announce every change
    this.item.dataset.status = status;
    this.part("progress").hidden = this.ended;
    this.part("progress").value = progress;
    const facts = [];
    if (status === "completed") facts.push(clock(this.song.duration), (this.song.format ?? request.format).toUpperCase());
    if (this.ended) facts.push(`seed ${this.song.seed ?? request.seed}`);
    if (request.tags) facts.push(request.tags.split(",").join(", "));
    if (!this.ended) {
      facts.length = 0;
      if (status === "queued" && this.song.queue_position != null) facts.push(place(this.song.queue_position));
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
    const above = rows.get(parent.job_id);
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

  reveal() {
    this.item.scrollIntoView({ block: "nearest" });
    this.part("h3").focus();
  }

  label() {
    // Of a song that somebody waits for, the first sound is made before the rest.
    const word = this.plays ? "Pause" : this.playable ? "Play" : "Play when ready";
    if (this.part(".play").textContent === word) return;
    this.part(".play").textContent = word;
    this.part(".play").setAttribute("aria-label", `${word}: ${this.name}`);
  }

  complain(text) {
    this.part(".error").textContent = text;
    this.part(".error").hidden = false;
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

  play() {
    player.play(this.sound);
  }

  reuse() {
    const { request } = this.song;
    hooks.reuse(request, request.continue_from && this.origin);
  }

  /** Go on from a second of it, or from its end. */
  goOn(seconds = this.song.duration) {
    const { job_id: id, request } = this.song;
    hooks.extend({ id, name: this.name, request }, Math.floor(Math.round(seconds * 1000) / FRAME) * FRAME);
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

  async remove() {
    const button = this.part(".delete");
    if (!button.classList.contains("sure")) {
      button.classList.add("sure");
      button.textContent = "Really delete?";
      setTimeout(() => {
        button.classList.remove("sure");
        button.textContent = "Delete";
      }, SURE_FOR);
      return;
    }
    try {
      await ask(`/generate/${this.song.job_id}?forget=true`, { method: "DELETE" });
      this.leave();
      document.querySelector("#library-title").focus();
    } catch (error) {
      this.complain(error.message);
    }
  }

  leave() {
    this.stop?.();
    player.drop(this.song.job_id);
    rows.delete(this.song.job_id);
    this.item.remove();
    hooks.left();
  }

  get matches() {
    const wanted = search.value.trim().toLowerCase();
    const { request } = this.song;
    return [this.name, request.lyrics, request.tags, this.song.job_id].some((text) => text.toLowerCase().includes(wanted));
  }
}
