// The player: one song at a time, its waveform to seek in, the songs before and after it.

import { close, heard, open, pause, playback, playing, position, resume, seek, silence, update, whole } from "./playback.js";
import { draw, setPeaks } from "./waveform.js";
import { SILENCE, brokenOff, clock } from "./words.js";

const box = document.querySelector("#player");
const wave = document.querySelector("#wave");
const toggle = document.querySelector("#toggle");
const further = document.querySelector("#go-on");
const STEP = 5; // seconds an arrow key moves
const LOADING_AFTER = 700; // ms of silence without a word
const ENDS = { gone: "The song was deleted.", unplayable: "The audio cannot be played." };
let song = null; // {id, name, status, playable, length, join, whole, urls}
let drawn = ""; // what the peaks that were asked for last are of
let note = ""; // how the latest song ended, where that is worth a word
let loading = 0; // since when
let reported = ""; // which song plays, as it was reported last
let neighbour = () => null;
let report = () => {};
let goOn = () => {};

function say(id, text) {
  const part = document.querySelector(id);
  if (part.textContent !== text) part.textContent = text; // screen readers announce every change
}

/** Why nothing sounds, or what else there is to say. */
function remark() {
  const why = silence();
  if (why !== "loading") loading = 0;
  else loading ||= Date.now();
  const words = why === "loading" && Date.now() - loading < LOADING_AFTER ? "" : SILENCE[why];
  return words || note || (song ? brokenOff(song.status, song.name) : "");
}

function show() {
  const [at, there, all] = [position(), heard(), whole()];
  const more = there < all;
  say("#at", clock(at));
  say("#length", clock(there));
  say("#whole", more ? `of up to ${clock(all)}` : "");
  say("#remark", remark());
  wave.setAttribute("aria-valuemax", Math.round(all));
  wave.setAttribute("aria-valuenow", Math.round(at));
  const rest = more ? ` that can be heard so far, up to ${clock(all)} when the song is complete` : "";
  const join = song?.join ?? null;
  const begun = join === null ? "" : `, new from ${clock(join)} on`;
  wave.setAttribute("aria-valuetext", `${clock(at)} of ${clock(there)}${rest}${begun}`);
  further.disabled = !song?.whole;
  toggle.classList.toggle("playing", playing());
  toggle.setAttribute("aria-label", playing() ? "Pause" : "Play");
  draw(at, there, all, join);
  const state = `${song?.id} ${playing()}`;
  if (state === reported) return;
  reported = state;
  report(song?.id, playing());
}

/** Fetch the peaks of what can be heard, as often as there is more of it. */
async function fetchPeaks() {
  const wanted = `${song.id} ${song.status} ${song.playable}`;
  if (wanted === drawn || (song.status !== "completed" && !song.playable)) return;
  drawn = wanted;
  try {
    const response = await fetch(song.urls.peaks);
    const found = response.ok ? await response.json() : null;
    if (wanted === drawn) {
      if (found) setPeaks(found);
      else drawn = ""; // asked for again with the next news
    }
  } catch {
    if (wanted === drawn) drawn = "";
  }
  show();
}

function start(wanted, from = 0) {
  song = wanted;
  box.hidden = false;
  document.body.classList.add("with-player");
  say("#playing", song.name);
  setPeaks(null);
  open(song, from);
  fetchPeaks();
}

/**
 * Play a song or recording `{id, name, status, playable, length, join, whole, urls}` (in seconds), or pause the one that
 * plays. `whole`: a song can go on from it; `urls` has those of its `file`, `stream`, `peaks` and `state`.
 */
export function play(wanted) {
  note = "";
  if (song?.id !== wanted.id) start(wanted);
  else if (playing()) pause();
  else resume();
}

/** Play a song from the moment at which it goes on from another one. */
export function playFromJoin(wanted) {
  note = "";
  if (song?.id !== wanted.id) return start(wanted, wanted.join);
  seek(wanted.join);
  if (!playing()) resume();
}

function branch() {
  if (!further.disabled) goOn(song.id, position());
}

/** Take news of a song, which may be the one that plays. */
export function follow(state) {
  if (song?.id !== state.id) return;
  song = state;
  update(state);
  fetchPeaks();
}

/** Close the player if it has this song, which was deleted. */
export function drop(id) {
  if (song?.id !== id) return;
  song = null;
  drawn = "";
  close();
  box.hidden = true;
  document.body.classList.remove("with-player");
}

function go(step) {
  const found = song && neighbour(song.id, step);
  if (found) start(found);
}

function onEnd(why) {
  note = ENDS[why] ?? brokenOff(why, song.name);
  if (!ENDS[why]) go(1);
  show();
}

/**
 * `next(id, step)` finds a song beside another; `onChange(id, playing)` is called when another song plays, or none;
 * `onBranch(id, seconds)` when a song is to go on from a moment of the one that is open.
 */
export function player(next, onChange, onBranch) {
  neighbour = next;
  report = onChange;
  goOn = onBranch;
  playback(show, onEnd);
  toggle.onclick = () => song && play(song);
  further.onclick = branch;
  document.querySelector("#previous").onclick = () => (position() > 3 ? seek(0) : go(-1));
  document.querySelector("#next").onclick = () => go(1);
  document.querySelector("#volume").oninput = (event) => (document.querySelector("#audio").volume = event.target.value);
  wave.onpointerdown = (event) => {
    const move = (moved) => seek(((moved.clientX - wave.getBoundingClientRect().left) / wave.clientWidth) * whole());
    wave.setPointerCapture(event.pointerId);
    wave.onpointermove = move;
    wave.onpointerup = wave.onpointercancel = () => (wave.onpointermove = null);
    move(event);
  };
  wave.onkeydown = (event) => {
    const to = {
      ArrowLeft: position() - STEP,
      ArrowDown: position() - STEP,
      ArrowRight: position() + STEP,
      ArrowUp: position() + STEP,
      Home: 0,
      End: whole(),
    }[event.key];
    const act = { " ": () => song && play(song), Enter: branch }[event.key];
    if (to === undefined && !act) return;
    event.preventDefault();
    act ? act() : seek(to);
  };
  new ResizeObserver(show).observe(wave);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", show);
}
