// A recording in the list: how its encoding is coming along, and its buttons. Songs that go on from it stand below it.

import { ask, sentence } from "./api.js";
import { Entry, hooks, search } from "./entry.js";
import { follow } from "./player.js";
import { FORMATS, MP3_RATES, clock } from "./words.js";

const LOOK_EVERY = 1_000; // ms, while it is encoded
const STATES = { queued: "Waiting", encoding: "Being encoded", ready: "Ready", failed: "Failed" };
const CHANNELS = { 1: "mono", 2: "stereo" };

/** The row of a recording, which keeps it up to date until it is ready or has failed. */
export class RecordingRow extends Entry {
  constructor(song) {
    super(song, song.title || "A recording");
    this.timer = 0; // of the next look
    this.part("h3").textContent = this.name;
    this.part(".reuse").hidden = true;
    this.part(".delete").hidden = this.part(".play").hidden = this.part(".menu").hidden = false;
    const formats = FORMATS.filter((format) => format !== "mp3" || MP3_RATES.has(song.sample_rate));
    this.offer(`/recordings/${song.job_id}/audio`, formats, null);
    this.show();
  }

  get ended() {
    return this.song.status === "ready" || this.song.status === "failed";
  }

  get playable() {
    return true;
  }

  /** The recording as the player takes it. */
  get sound() {
    const { job_id: id, status, duration } = this.song;
    const place = `/recordings/${id}`;
    const urls = { file: `${place}/audio`, peaks: `${place}/peaks`, state: place };
    return { id, name: this.name, status: "completed", playable: duration, length: duration, join: null, whole: status === "ready", urls };
  }

  get removal() {
    return `/recordings/${this.song.job_id}`;
  }

  /** Apply a state. */
  update(state) {
    const before = this.song.status;
    this.song = { children: [], ...state, job_id: state.recording_id };
    this.show();
    follow(this.sound);
    if (before !== "ready" && this.song.status === "ready") hooks.ready();
    this.watch();
  }

  show() {
    const { status, progress, duration, channels, error } = this.song;
    this.showState(status === "ready" ? "completed" : status, STATES[status], progress, this.ended);
    const facts = ["Recording", clock(duration), CHANNELS[channels] ?? `${channels} channels`];
    if (status === "encoding") facts.push(`${Math.round(progress)} %`);
    this.part(".facts").textContent = facts.join(" · ");
    this.part(".extend").hidden = status !== "ready";
    this.label();
    if (status === "failed") this.complain(`${sentence(error ?? "no reason is known")} Delete it, or upload it again.`);
    else this.part(".error").hidden = true;
  }

  /** A recording goes on from nothing. */
  showJoin() {}

  /** Look at it again in a moment, until it is ready. */
  watch() {
    if (this.ended || this.timer) return;
    this.timer = setTimeout(async () => {
      this.timer = 0;
      try {
        const state = await ask(`/recordings/${this.song.job_id}`);
        if (this.item.isConnected) this.update(state);
      } catch (error) {
        error.status === 404 ? this.leave() : this.watch();
      }
    }, LOOK_EVERY);
  }

  leave() {
    clearTimeout(this.timer);
    super.leave();
  }

  /** Go on from a second of it, or from its end. */
  goOn(seconds = this.song.duration) {
    hooks.begin({ recording_id: this.song.job_id, name: this.name, at_ms: this.moment(seconds) });
  }

  get matches() {
    const wanted = search.value.trim().toLowerCase();
    return [this.name, this.song.job_id].some((text) => text.toLowerCase().includes(wanted));
  }
}
