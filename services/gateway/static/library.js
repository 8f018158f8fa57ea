// The list of songs: a row each, kept up to date by their events, or by the list where there are too many to follow.

import { ask, follow, sentence } from "./api.js";
import * as player from "./player.js";
import { ENDED, FORMATS, clock, doing, nameOf, place, until } from "./words.js";

const PAGE = 20;
const FOLLOWED = 8; // songs with a socket of their own
const LOOK_EVERY = 5_000; // ms
const SURE_FOR = 4_000; // ms in which a second press deletes
const list = document.querySelector("#songs");
const template = document.querySelector("#song");
const search = document.querySelector("#search");
const more = document.querySelector("#more");
const empty = document.querySelector("#empty");
const rows = new Map(); // by id
let cursor = null; // of the page after the oldest that is shown
let first = true;
let reuse = () => {};

class Row {
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
    for (const [name, act] of Object.entries({ play: "play", reuse: "reuse", cancel: "cancel", delete: "remove" })) {
      this.part(`.${name}`).onclick = () => this[act]();
      this.part(`.${name}`).setAttribute("aria-label", `${this.part(`.${name}`).textContent}: ${this.name}`);
    }
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
    return { id, name: this.name, status, playable, length: status === "completed" ? duration : longest };
  }

  /** Apply a state or an event. */
  update(state) {
    const known = { ...this.song };
    if (state.kind === "queued" || state.queue_position !== undefined) known.queue_position = state.queue_position;
    if (state.stage) this.stage = state.stage;
    for (const name of ["status", "eta", "error", "duration", "playable_seconds", "completed_at", "seed", "format", "sample_rate"])
      if (state[name] !== undefined) known[name] = state[name];
    if (state.duration_s) known.duration = state.duration_s;
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
    this.label();
    this.part(".menu").hidden = status !== "completed";
    this.part(".cancel").hidden = this.ended;
    this.part(".delete").hidden = !this.ended;
    if (status === "failed") this.complain(`${sentence(this.song.error ?? "no reason is known")} “Use again” tries it once more.`);
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
        look(); // for its length and so on; and another song can be followed now
      },
    );
  }

  play() {
    player.play(this.sound);
  }

  reuse() {
    reuse(this.song.request);
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
    arrange();
  }

  get matches() {
    const wanted = search.value.trim().toLowerCase();
    const { request } = this.song;
    return [this.name, request.lyrics, request.tags, this.song.job_id].some((text) => text.toLowerCase().includes(wanted));
  }
}

/** Order the rows, newest first; hide those that the search does not match. */
function arrange() {
  const sorted = [...rows.values()].sort((a, b) => (a.song.created_at < b.song.created_at ? 1 : -1));
  sorted.forEach((row, index) => {
    if (list.children[index] !== row.item) list.insertBefore(row.item, list.children[index] ?? null);
    row.item.hidden = !row.matches;
  });
  const shown = sorted.some((row) => !row.item.hidden);
  empty.hidden = shown;
  if (first) empty.textContent = "Looking for songs…";
  else empty.textContent = rows.size ? "No song matches." : "No songs yet. The first one is a few words away.";
  more.hidden = cursor === null;
}

function take(songs) {
  for (const song of songs) {
    const row = rows.get(song.job_id);
    if (!row) rows.set(song.job_id, new Row(song));
    else if (!row.stop || ENDED.has(song.status)) row.update(song);
  }
  arrange();
  for (const row of rows.values()) row.watch();
}

/** Ask for the newest songs, which finds those made elsewhere and updates those that are not followed. */
export async function look() {
  try {
    const page = await ask(`/generate?limit=${PAGE}`);
    if (first) cursor = page.next;
    first = false;
    const oldest = page.next === null ? "" : page.songs.at(-1)?.created_at;
    const there = new Set(page.songs.map((song) => song.job_id));
    for (const row of [...rows.values()]) // removed elsewhere
      if (row.song.created_at >= oldest && !there.has(row.song.job_id)) row.leave();
    take(page.songs);
  } catch {
    // the banner says it
  }
}

async function lookFurther() {
  more.disabled = true;
  try {
    const page = await ask(`/generate?limit=${PAGE}&cursor=${encodeURIComponent(cursor)}`);
    cursor = page.next;
    take(page.songs);
  } catch {
    // the button stays
  }
  more.disabled = false;
}

/** The nearest song that can be played in the list above another (`step` -1) or below it (1), as the player takes it. */
export function beside(id, step) {
  const order = [...list.children].map((item) => rows.get(item.id.slice("song-".length)));
  const at = order.findIndex((row) => row.song.job_id === id);
  const others = step > 0 ? order.slice(at + 1) : order.slice(0, Math.max(at, 0)).reverse();
  return others.find((row) => row.playable && !row.item.hidden)?.sound ?? null;
}

/** Show which song plays. */
export function mark(id, playing) {
  for (const row of rows.values()) {
    const here = row.song.job_id === id;
    if (here) row.watch(true);
    row.item.classList.toggle("playing", here);
    row.plays = here && playing;
    row.label();
  }
}

/** Set up the list; `again` is called with a request that is to be used again. */
export function library(again) {
  reuse = again;
  search.oninput = arrange;
  more.onclick = lookFurther;
  arrange();
  look();
  setInterval(() => document.hidden || look(), LOOK_EVERY);
}
