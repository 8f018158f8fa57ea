// The list of songs: a row each, kept up to date by their events, or by the list where there are too many to follow.

import { ask } from "./api.js";
import { Row, hooks, rows } from "./row.js";
import { inTrees, relatives } from "./versions.js";
import { ENDED } from "./words.js";

const PAGE = 20;
const LOOK_EVERY = 5_000; // ms
const DEEPEST = 4; // levels of a tree that are shown by indentation
const list = document.querySelector("#songs");
const search = document.querySelector("#search");
const more = document.querySelector("#more");
const empty = document.querySelector("#empty");
let cursor = null; // of the page after the oldest that is shown
let first = true;

/** Order the rows, each song above those that go on from it; hide those that the search does not match. */
function arrange() {
  const sorted = inTrees(rows);
  sorted.forEach(([row, depth], index) => {
    if (list.children[index] !== row.item) list.insertBefore(row.item, list.children[index] ?? null);
    row.item.hidden = !row.matches;
    row.item.style.setProperty("--depth", Math.min(depth, DEEPEST));
    row.item.setAttribute("aria-level", depth + 1);
    row.showJoin(); // the song that it goes on from may have come or gone
  });
  const shown = sorted.some(([row]) => !row.item.hidden);
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
  completeTrees();
}

/** Load the songs that belong to the trees of those that are there. */
async function completeTrees() {
  const found = await relatives(rows);
  found.length ? take(found) : arrange();
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

/** Go on from a second of a song. */
export function branch(id, seconds) {
  rows.get(id)?.goOn(seconds);
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

/** Set up the list; `form` has the functions `reuse` and `extend` of the composer. */
export function library(form) {
  Object.assign(hooks, form, { ended: look, left: arrange });
  search.oninput = arrange;
  more.onclick = lookFurther;
  arrange();
  look();
  setInterval(() => document.hidden || look(), LOOK_EVERY);
}
