// The sound of one song: the stream of one that is being made, the file of a finished one. What breaks off is taken up
// again where it sounded.

import { ask, onConnection } from "./api.js";
import { ENDED } from "./words.js";

const audio = document.querySelector("#audio");
const NEAR = 0.5; // seconds: so close to its end, a song has ended
const EDGE = 2; // seconds before the end of what can be heard to which seeking goes, while there will be more
// Seconds that a browser may have and not play before it has more: Chromium wants ten frames of FLAC and 32 KiB, which
// is a second of music and a lot of silence.
const HELD_BACK = 8;
const LOOK_EVERY = 500; // ms
const STUCK_AFTER = 5_000; // ms without a sound or a byte
const FIRST_PAUSE = 500; // ms between two attempts, each time twice as long
const LONGEST_PAUSE = 10_000; // ms
const MOST_FAULTS = 3; // attempts in vain at a finished song that the server knows
const SEEK_AFTER = 200; // ms in which the listener may go elsewhere still, where going there costs a request
let song = null; // {id, status, playable, length, urls}
let streams = false; // the source is the stream, not the file
let start = 0; // second of the song at which the source begins
let offset = 0; // seconds to add to the browser's clock: some begin at 0 with a source that begins in mid-song
let target = null; // where the song is to go on, until the source is there
let wish = false; // the listener wants to hear it
let over = false; // it was played to its end
let connected = true; // the server answers requests
let lost = false; // it does not say how the song is
let faults = 0; // attempts since something sounded
let timer = 0; // of the next attempt
let attempt = 0; // number of the latest
let attempting = false;
let alive = { at: 0, time: 0 }; // the latest sound or byte
let changed = () => {};
let ended = () => {};

const growing = () => song && !ENDED.has(song.status);
const broken = () => song.status === "failed" || song.status === "cancelled";

/** The second of the song that sounds, or that will once its source is there. */
export function position() {
  return target ?? offset + audio.currentTime;
}

/** How much of the song can be heard, in seconds. */
export function heard() {
  if (!song) return 0;
  if (song.status === "completed") return song.length ?? (Number.isFinite(audio.duration) ? audio.duration : 0);
  return Math.max(song.playable, position());
}

/** The length of the song, in seconds; while it is being made, the longest that it can have. */
export function whole() {
  return growing() ? Math.max(song.length ?? 0, heard()) : heard();
}

/** Whether the listener wants to hear the song, be there a sound or not. */
export function playing() {
  return wish;
}

const dry = () => growing() && heard() - position() < HELD_BACK;

/**
 * Why nothing sounds although it should: "lost" (no server), "early" (no sound is made yet), "dry" (the rest is being
 * made), "loading"; else "".
 */
export function silence() {
  if (!wish) return "";
  if (target === null && !audio.seeking && audio.readyState >= HTMLMediaElement.HAVE_FUTURE_DATA) return "";
  if (lost || !connected) return "lost";
  if (!dry()) return "loading";
  return heard() ? "dry" : "early";
}

/** Open a song `{id, status, playable, length, urls}` (in seconds) and play it from a second on. */
export function open(wanted, from) {
  song = wanted;
  wish = true;
  faults = 0;
  load(from);
}

/** Close the song. */
export function close() {
  rest();
  song = null;
  wish = false;
  audio.removeAttribute("src");
  audio.load();
}

/** Take news of the song. The source stays: nothing interrupts a song that is completed while it plays. */
export function update(state) {
  // What was made of a song that failed is removed; what the browser has of it can be heard still.
  song = { ...song, ...state, playable: ENDED.has(state.status) ? song.playable : state.playable };
  changed();
}

/** Open the source so that it goes on at a second of the song. */
function load(seconds) {
  rest();
  if (streams && song.status === "completed") faults = 0; // those of the stream
  streams = song.status !== "completed";
  start = streams && seconds > NEAR ? seconds : 0;
  target = streams ? start : seconds;
  offset = 0;
  over = false;
  alive = { at: target, time: Date.now() };
  const from = start ? `?from=${start.toFixed(3)}` : "";
  audio.src = streams ? `${song.urls.stream}${from}` : song.urls.file;
  if (wish) sound();
  changed();
}

function sound() {
  audio.play().catch((error) => {
    if (error.name !== "NotAllowedError") return; // an event tells of all else
    wish = false; // the browser may want a click first
    changed();
  });
}

/** Pause: also the attempts to take a lost song up again. */
export function pause() {
  rest();
  wish = false;
  audio.pause();
  changed();
}

/** Go on where it was paused, or begin again after its end. */
export function resume() {
  wish = true;
  faults = 0;
  alive = { at: position(), time: Date.now() };
  if (over && song.status === "completed") load(0);
  else if (audio.error) again();
  else sound();
  over = false;
  changed();
}

/** Go to a second of the song that can be heard. */
export function seek(seconds) {
  if (!song) return;
  const last = growing() ? Math.max(heard() - EDGE, position()) : heard();
  const to = Math.max(0, Math.min(seconds, last));
  over = false;
  if (reachable(to)) audio.currentTime = to - offset;
  else {
    rest();
    target = to;
    timer = setTimeout(() => load(to), SEEK_AFTER);
  }
  changed();
}

/** Whether the browser can go to a second of the song in the source that it has. */
function reachable(seconds) {
  if (target !== null || audio.error || seconds < start) return false;
  const at = seconds - offset;
  const { seekable } = audio;
  return Array.from(seekable, (_, n) => n).some((n) => seekable.start(n) <= at && at <= seekable.end(n) + NEAR);
}

/** End all attempts. */
function rest() {
  clearTimeout(timer);
  attempting = lost = false;
  attempt += 1;
}

/** Take the song up again: at once, or after a pause that grows as long as nothing sounds. */
function again() {
  if (attempting) return;
  attempting = true;
  timer = setTimeout(recover, faults ? Math.min(FIRST_PAUSE * 2 ** (faults - 1), LONGEST_PAUSE) : 0);
  faults += 1;
}

async function recover() {
  const turn = attempt;
  const at = position();
  let state = null;
  let gone = false;
  try {
    state = await ask(song.urls.state);
  } catch (error) {
    gone = error.status === 404;
  }
  if (turn !== attempt) return; // it sounds again, or the listener has decided otherwise
  attempting = false;
  if (gone) finish("gone");
  else if (state) {
    if (lost || !state.playable_seconds) faults = 1; // that a song cannot be heard yet is no fault
    // All of a recording can be heard, whatever its state.
    const status = state.recording_id ? "completed" : state.status;
    update({ status, playable: state.playable_seconds, length: state.duration ?? song.length });
    goOn(at);
  } else {
    lost = true;
    again();
    changed();
  }
}

function goOn(at) {
  if (broken()) finish(song.status);
  else if (song.status !== "completed") load(at);
  else if (audio.ended && at > heard() - NEAR) finish("completed");
  else if (faults > MOST_FAULTS) finish("unplayable");
  else load(at);
}

function finish(why) {
  rest();
  wish = false;
  over = true;
  changed();
  ended(why);
}

/** Notice that nothing sounds although there is more to hear. */
function look() {
  if (!song || !wish) return;
  const at = position();
  const broke = audio.error || audio.ended; // what plays cannot go on by itself
  if (at !== alive.at && !broke) {
    alive = { at, time: Date.now() };
    if (target === null && (attempting || faults)) {
      rest(); // the browser has helped itself
      faults = 0;
    }
  } else if (broke) {
    if (audio.paused) again();
  } else if (dry()) alive.time = Date.now();
  else if (Date.now() - alive.time > STUCK_AFTER) again();
  changed();
}

/** `onChange()` is called when anything here changes; `onEnd(why)` at the end: a status, "gone" or "unplayable". */
export function playback(onChange, onEnd) {
  changed = onChange;
  ended = onEnd;
  for (const name of ["timeupdate", "durationchange", "seeking", "seeked", "waiting", "playing", "emptied"])
    audio.addEventListener(name, () => changed());
  audio.addEventListener("progress", () => (alive.time = Date.now()));
  audio.addEventListener("loadedmetadata", () => {
    if (!streams && target) audio.currentTime = target;
  });
  audio.addEventListener("canplay", () => {
    if (start && audio.currentTime < start / 2) offset = start;
    target = null;
    changed();
  });
  // By the keys of a keyboard or a headset, say.
  audio.addEventListener("play", () => {
    wish = true;
    changed();
  });
  audio.addEventListener("pause", () => {
    if (audio.paused && !audio.ended && !audio.error && target === null) pause();
  });
  audio.addEventListener("error", () => {
    // Firefox plays what it has of a stream that was cut.
    if (song && wish && (audio.paused || audio.readyState < HTMLMediaElement.HAVE_FUTURE_DATA)) again();
  });
  audio.addEventListener("ended", () => {
    if (!song) return;
    if (!streams || (song.status === "completed" && position() > heard() - NEAR)) finish(song.status);
    else again(); // the end of the stream is that of the song if its status says so
  });
  onConnection((state) => (connected = state !== false));
  setInterval(look, LOOK_EVERY);
}
