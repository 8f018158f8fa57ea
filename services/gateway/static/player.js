// The player: one song at a time, its waveform to seek in, the songs before and after it.

import { clock } from "./words.js";

const box = document.querySelector("#player");
const audio = document.querySelector("#audio");
const wave = document.querySelector("#wave");
const toggle = document.querySelector("#toggle");
const STEP = 5; // seconds an arrow key moves
let song = null; // {id, name}
let peaks = null; // the amplitude of each stretch of the song, at most 1; or null
let neighbour = () => null;
let report = () => {};

function length() {
  return Number.isFinite(audio.duration) ? audio.duration : 0;
}

function draw() {
  const scale = window.devicePixelRatio || 1;
  const width = wave.clientWidth * scale;
  const height = wave.clientHeight * scale;
  if (wave.width !== width || wave.height !== height) [wave.width, wave.height] = [width, height];
  const paint = wave.getContext("2d");
  const style = getComputedStyle(wave);
  const played = length() ? (audio.currentTime / length()) * width : 0;
  const bar = 3 * scale;
  paint.clearRect(0, 0, width, height);
  for (let x = 0; x < width; x += bar) {
    let size = 0.08;
    if (peaks) {
      const first = Math.floor((x / width) * peaks.length);
      const last = Math.max(first + 1, Math.floor(((x + bar) / width) * peaks.length));
      size = Math.max(size, ...peaks.slice(first, last));
    }
    paint.fillStyle = x < played ? style.getPropertyValue("--accent") : style.getPropertyValue("--soft");
    const tall = size * height;
    paint.fillRect(x, (height - tall) / 2, bar * 0.66, tall);
  }
}

function show() {
  const text = clock(audio.currentTime);
  document.querySelector("#at").textContent = text;
  document.querySelector("#length").textContent = clock(length());
  wave.setAttribute("aria-valuemax", Math.round(length()));
  wave.setAttribute("aria-valuenow", Math.round(audio.currentTime));
  wave.setAttribute("aria-valuetext", `${text} of ${clock(length())}`);
  toggle.classList.toggle("playing", !audio.paused);
  toggle.setAttribute("aria-label", audio.paused ? "Play" : "Pause");
  draw();
}

function seek(seconds) {
  audio.currentTime = Math.min(Math.max(0, seconds), length());
  show();
}

/** One amplitude for the lowest and highest sample of each stretch. The largest is 1: quiet songs show a shape too. */
function amplitudes(data) {
  const found = [];
  for (let n = 0; n < data.length; n += 2) found.push(Math.max(-data[n], data[n + 1]));
  const largest = Math.max(1, ...found);
  return found.map((size) => size / largest);
}

async function fetchPeaks(id) {
  peaks = null;
  try {
    const response = await fetch(`/generate/${id}/peaks`);
    if (response.ok && song?.id === id) peaks = amplitudes((await response.json()).data);
  } catch {
    // then a plain bar is drawn
  }
  draw();
}

/** Play a song, or pause the one that plays. */
export function play(wanted) {
  if (song?.id === wanted.id) {
    audio.paused ? audio.play() : audio.pause();
    return;
  }
  song = wanted;
  box.hidden = false;
  document.body.classList.add("with-player");
  document.querySelector("#playing").textContent = song.name;
  audio.src = `/generate/${song.id}/result`;
  audio.play().catch(() => {}); // a browser may want a click first
  fetchPeaks(song.id);
  report(song.id, false);
}

/** Close the player if it has this song, which was deleted. */
export function drop(id) {
  if (song?.id !== id) return;
  song = null;
  audio.removeAttribute("src");
  audio.load();
  box.hidden = true;
  document.body.classList.remove("with-player");
}

/** `next(id, step)` finds a song beside another; `onChange(id, playing)` is called when another song plays, or none. */
export function player(next, onChange) {
  neighbour = next;
  report = onChange;
  for (const name of ["timeupdate", "durationchange", "seeked", "emptied"]) audio.addEventListener(name, show);
  for (const name of ["play", "pause", "ended"])
    audio.addEventListener(name, () => {
      show();
      if (song) report(song.id, !audio.paused);
    });
  audio.addEventListener("error", () => {
    if (song) document.querySelector("#playing").textContent = `${song.name}: the audio cannot be played`;
  });
  const go = (step) => {
    const found = song && neighbour(song.id, step);
    if (found) play(found);
  };
  audio.addEventListener("ended", () => go(1));
  toggle.onclick = () => song && play(song);
  document.querySelector("#previous").onclick = () => (audio.currentTime > 3 ? seek(0) : go(-1));
  document.querySelector("#next").onclick = () => go(1);
  document.querySelector("#volume").oninput = (event) => (audio.volume = event.target.value);
  wave.onpointerdown = (event) => {
    const move = (moved) => seek(((moved.clientX - wave.getBoundingClientRect().left) / wave.clientWidth) * length());
    wave.setPointerCapture(event.pointerId);
    wave.onpointermove = move;
    wave.onpointerup = wave.onpointercancel = () => (wave.onpointermove = null);
    move(event);
  };
  wave.onkeydown = (event) => {
    const to = {
      ArrowLeft: audio.currentTime - STEP,
      ArrowDown: audio.currentTime - STEP,
      ArrowRight: audio.currentTime + STEP,
      ArrowUp: audio.currentTime + STEP,
      Home: 0,
      End: length(),
    }[event.key];
    if (to === undefined && event.key !== " ") return;
    event.preventDefault();
    event.key === " " ? song && play(song) : seek(to);
  };
  new ResizeObserver(draw).observe(wave);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
}
