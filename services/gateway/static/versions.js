// Songs that go on from one another, or from a recording: their order in the list, and what of a tree is not loaded.

import { ask } from "./api.js";

const MOST = 100; // songs of one answer
const parentOf = (song) => song.parent?.job_id ?? song.parent?.recording_id;
const asked = new Set(); // lists that were asked for already: what they did not have, they will not have

/**
 * Rows as `[row, depth]`: a song, below it those that go on from it, newest first. What has the newest song is first.
 * `rows` is a map by id.
 */
export function inTrees(rows) {
  const below = new Map(); // by id of the parent; "" for those without one
  for (const row of rows.values()) {
    const parent = parentOf(row.song);
    const key = rows.has(parent) ? parent : "";
    below.set(key, [...(below.get(key) ?? []), row]);
  }
  const grow = (row, depth) => {
    const branches = (below.get(row.song.job_id) ?? []).map((child) => grow(child, depth + 1)).sort(newestFirst);
    const newest = branches.reduce((last, branch) => (branch.newest > last ? branch.newest : last), row.song.created_at);
    return { newest, rows: [[row, depth], ...branches.flatMap((branch) => branch.rows)] };
  };
  return (below.get("") ?? []).map((row) => grow(row, 0)).sort(newestFirst).flatMap((branch) => branch.rows);
}

const newestFirst = (one, other) => (one.newest < other.newest ? 1 : -1);

/** Ask for what is connected with the songs in `rows` and not among them. Returns songs and recordings; [] for none. */
export async function relatives(rows) {
  const found = [];
  for (const { song } of [...rows.values()]) {
    try {
      if (song.parent?.exists && !rows.has(parentOf(song))) found.push(...(await above(song)));
      const missing = (song.children ?? []).filter((id) => !rows.has(id));
      if (missing.length) found.push(...(await below(song, missing)));
    } catch {
      // the next look asks again
    }
  }
  return found;
}

async function above(song) {
  try {
    const { job_id, recording_id } = song.parent;
    return [await ask(job_id ? `/generate/${job_id}` : `/recordings/${recording_id}`)];
  } catch (error) {
    if (error.status !== 404) throw error;
    song.parent = { ...song.parent, exists: false };
    return [];
  }
}

async function below(song, missing) {
  const key = missing.join();
  if (asked.has(key)) return [];
  const page = await ask(`/generate?parent=${song.job_id}&limit=${MOST}`);
  asked.add(key);
  return page.songs;
}
