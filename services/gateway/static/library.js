// The list of songs and recordings: a row each, kept up to date by their events, or by the list where there are too many
// to follow.

import { ask } from "./api.js";
import { hooks, rows, search } from "./entry.js";
import { RecordingRow } from "./recording.js";
import { Row } from "./row.js";
import { inTrees, relatives } from "./versions.js";
import { ENDED } from "./words.js";

const PAGE = 20;
const LOOK_EVERY = 5_000; // ms
const DEEPEST = 4; // levels of a tree that are shown by indentation
const list = document.querySelector("#songs");
const more = document.querySelector("#more");
const empty = document.querySelector("#empty");
const KINDS = { songs: "/generate", recordings: "/recordings" };
const cursors = { songs: null, recordings: null }; // of the page after the oldest that is shown
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
  more.hidden = Object.values(cursors).every((cursor) => cursor === null);
}

function rowOf(song) {
  return song.recording_id ? new RecordingRow(song) : new Row(song);
}

function take(found) {
  for (const each of found) {
    const song = each.recording_id ? { ...each, job_id: each.recording_id } : each;
    const row = rows.get(song.job_id);
    if (!row) rows.set(song.job_id, rowOf(song));
    else if (song.recording_id || !row.stop || ENDED.has(song.status)) row.update(song);
  }
  arrange();
  for (const row of rows.values()) row.watch();
  completeTrees();
}

/** Load what belongs to the trees of the songs that are there. */
async function completeTrees() {
  const found = await relatives(rows);
  found.length ? take(found) : arrange();
}

/** Ask for the newest songs and recordings, which finds those made elsewhere and updates those that are not followed. */
export async function look() {
  try {
    const names = Object.keys(KINDS);
    const pages = await Promise.all(names.map((name) => ask(`${KINDS[name]}?limit=${PAGE}`)));
    const found = [];
    names.forEach((name, at) => {
      const page = pages[at];
      if (first) cursors[name] = page.next;
      removeGone(name, page);
      found.push(...page[name]);
    });
    first = false;
    take(found);
  } catch {
    // the banner says it
  }
}

/** Take away the rows of what was removed elsewhere, given the newest page of songs or of recordings. */
function removeGone(name, page) {
  const oldest = page.next === null ? "" : page[name].at(-1)?.created_at;
  const there = new Set(page[name].map((each) => each.recording_id ?? each.job_id));
  for (const row of [...rows.values()]) {
    const { job_id, recording_id, created_at } = row.song;
    if ((name === "recordings") === Boolean(recording_id) && created_at >= oldest && !there.has(job_id)) row.leave();
  }
}

async function lookFurther() {
  more.disabled = true;
  try {
    for (const name of Object.keys(KINDS)) {
      if (cursors[name] === null) continue;
      const page = await ask(`${KINDS[name]}?limit=${PAGE}&cursor=${encodeURIComponent(cursors[name])}`);
      cursors[name] = page.next;
      take(page[name]);
    }
  } catch {
    // the button stays
  }
  more.disabled = false;
}

/** Show a recording that was uploaded here, and begin a song with it. */
export function begun(recording) {
  take([recording]);
  rows.get(recording.recording_id).goOn();
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

/** Set up the list; `form` has the functions `reuse`, `extend`, `begin` and `ready` of the composer. */
export function library(form) {
  Object.assign(hooks, form, { ended: look, left: arrange });
  search.oninput = arrange;
  more.onclick = lookFurther;
  arrange();
  look();
  setInterval(() => document.hidden || look(), LOOK_EVERY);
}
