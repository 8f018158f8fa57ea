// What the list shows: songs and recordings, and what a row of either has.

import { ask } from "./api.js";
import { FRAME } from "./continuation.js";
import * as player from "./player.js";

const SURE_FOR = 4_000; // ms in which a second press deletes
const template = document.querySelector("#song");
export const search = document.querySelector("#search");
export const rows = new Map(); // by id of the song or recording
/** What the rest of the page does: fill the form, look at a song that ended, close the gap of a row that left. */
export const hooks = { reuse: () => {}, extend: () => {}, begin: () => {}, ready: () => {}, ended: () => {}, left: () => {} };

/** A row of the list. Those that extend it know what it shows: a `song`, which may be a recording with a `job_id`. */
export class Entry {
  constructor(song, name) {
    this.song = song;
    this.name = name;
    this.plays = false; // the player has it, and does not pause
    this.item = template.content.cloneNode(true).querySelector("li");
    this.item.id = `song-${song.job_id}`;
    this.part("progress").setAttribute("aria-label", `Progress of ${name}`);
    this.part(".menu summary").setAttribute("aria-label", `Download: ${name}`);
    this.part(".delete").onclick = () => this.remove();
    this.part(".play").onclick = () => player.play(this.sound);
    this.part(".extend").onclick = () => this.goOn();
    for (const made of this.item.querySelectorAll(".actions > button")) made.setAttribute("aria-label", `${made.textContent}: ${name}`);
  }

  part(selector) {
    return this.item.querySelector(selector);
  }

  /** Links that download it as each of `formats`, from `place`; `original` is what it is stored as. */
  offer(place, formats, original) {
    const links = formats.map((format) => {
      const link = document.createElement("a");
      link.href = `${place}?format=${format}`;
      link.download = "";
      link.textContent = format.toUpperCase() + (format === original ? " (as made)" : "");
      link.onclick = () => {
        this.part(".menu").open = false; // braces: a handler that returns false stops the download
      };
      const item = document.createElement("li");
      item.append(link);
      return item;
    });
    this.part(".menu ul").append(...links);
  }

  /** Show its state in a word, and how far it is in per cent. */
  showState(status, word, progress, ended) {
    if (this.part(".state").textContent !== word) this.part(".state").textContent = word; // screen readers announce every change
    this.item.dataset.status = status;
    this.part("progress").hidden = ended;
    this.part("progress").value = progress;
  }

  /** The whole frames up to a second of it, in ms. */
  moment(seconds) {
    return Math.floor(Math.round(seconds * 1000) / FRAME) * FRAME;
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

  /** Delete it at the second press. */
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
      await ask(this.removal, { method: "DELETE" });
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
}
