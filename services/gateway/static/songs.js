// The songs that this browser asked for: kept in localStorage, shown as rows, each followed until it has ended.

import { ask, follow } from "./api.js";

const KEY = "heartmula.songs";
const KEPT = 50;
const RETRY_AFTER = 3_000; // ms
const ENDED = new Set(["completed", "failed", "cancelled"]);
const WORDS = {
  queued: "Waiting",
  generating: "Writing",
  decoding: "Turning into sound",
  completed: "Finished",
  failed: "Failed",
  cancelled: "Cancelled",
  unknown: "No longer known",
};
const STAGES = {
  loading: "Loading the model",
  generating: "Writing",
  paused: "Pausing: another song has its turn",
  waiting: "Waiting for its sound",
  decoding: "Turning into sound",
  storing: "Storing",
};

const list = document.querySelector("#songs");
const template = document.querySelector("#song");
const none = document.querySelector("#no-songs");

function read() {
  try {
    const found = JSON.parse(localStorage.getItem(KEY) ?? "[]");
    return Array.isArray(found) ? found.filter((song) => typeof song?.id === "string") : [];
  } catch {
    return []; // storage is switched off, or holds something else
  }
}

function write(songs) {
  try {
    localStorage.setItem(KEY, JSON.stringify(songs.slice(0, KEPT)));
  } catch {
    // without storage the songs are forgotten with the page
  }
}

/** Show every song that is remembered. */
export function restore() {
  for (const song of read()) list.append(row(song));
  none.hidden = list.children.length > 0;
}

/** Remember a song that was just accepted, and show it first. */
export function add(jobId, name) {
  const song = { id: jobId, name, since: Date.now() };
  write([song, ...read()]);
  list.prepend(row(song));
  none.hidden = true;
}

function place(before) {
  if (before === 0) return "next in line";
  return before === 1 ? "1 song before it" : `${before} songs before it`;
}

function ready(eta) {
  const time = new Date(eta).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", second: "2-digit" });
  return `ready at about ${time}`;
}

function row(song) {
  const item = template.content.cloneNode(true).querySelector("li");
  const part = (selector) => item.querySelector(selector);
  part("h3").textContent = song.name;
  part(".cancel").setAttribute("aria-label", `Cancel ${song.name}`);
  part(".download").setAttribute("aria-label", `Download ${song.name}`);
  part(".forget").setAttribute("aria-label", `Remove ${song.name} from this list`);
  let stage = null;
  let shown = "";

  function say(text) {
    if (text !== shown) part(".state").textContent = shown = text; // a screen reader hears changes only
  }

  function complain(text) {
    part(".error").textContent = text;
    part(".error").hidden = false;
  }

  function show(state) {
    if (state.reconnecting) {
      say("Reconnecting…");
      return;
    }
    stage = state.stage ?? stage;
    say(state.status === "queued" || ENDED.has(state.status) ? WORDS[state.status] : STAGES[stage] ?? WORDS[state.status]);
    part("progress").value = state.progress;
    part("progress").textContent = `${Math.round(state.progress)} %`;
    part("progress").setAttribute("aria-label", `Progress of ${song.name}`);
    const facts = [`${Math.round(state.progress)} %`];
    if (state.queue_position != null && state.status === "queued") facts.push(place(state.queue_position));
    if (state.total && !ENDED.has(state.status)) facts.push(`step ${state.done} of ${state.total}`);
    if (state.eta) facts.push(ready(state.eta));
    if (!ENDED.has(state.status)) part(".facts").textContent = facts.join(" · ");
    if (state.status === "failed") complain(state.error ?? "No reason is known.");
  }

  async function finish(why) {
    part("progress").hidden = true;
    part(".cancel").hidden = true;
    part(".forget").hidden = false;
    part(".facts").textContent = "";
    if (why === "unknown") {
      say(WORDS.unknown);
      return;
    }
    try {
      const state = await ask(`/generate/${song.id}/status`);
      show(state);
      if (state.status === "completed") play(state);
      part(".error").hidden = state.status !== "failed";
    } catch (error) {
      complain(error.message);
      setTimeout(() => item.isConnected && finish(why), RETRY_AFTER);
    }
  }

  function play(state) {
    const url = `/generate/${song.id}/result`;
    const audio = part("audio");
    audio.src = url;
    audio.hidden = false;
    audio.setAttribute("aria-label", song.name);
    audio.onerror = () => complain("The audio cannot be played; it may no longer be stored.");
    const link = part(".download");
    link.href = url;
    link.download = `${state.title || song.id}.${state.format}`;
    link.hidden = false;
    const seconds = state.duration ? `${state.duration.toFixed(1)} s · ` : "";
    part(".facts").textContent = `${seconds}${state.format.toUpperCase()} · seed ${state.seed}`;
  }

  const stop = follow(song.id, show, finish);

  part(".cancel").onclick = async () => {
    part(".cancel").disabled = true;
    try {
      await ask(`/generate/${song.id}`, { method: "DELETE" });
    } catch (error) {
      complain(error.message);
      part(".cancel").disabled = false;
    }
  };

  part(".forget").onclick = () => {
    stop();
    write(read().filter((other) => other.id !== song.id));
    item.remove();
    none.hidden = list.children.length > 0;
    document.querySelector("#songs-title").focus();
  };

  return item;
}
