// Words for the states of songs, for phases, places and times.

export const ENDED = new Set(["completed", "failed", "cancelled"]);
export const FORMATS = ["flac", "wav", "mp3", "ogg"];
export const MP3_RATES = new Set([8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000]); // Hz: it has no others
const STATUS = { queued: "Waiting", completed: "Finished", failed: "Failed", cancelled: "Cancelled" };
const STAGES = {
  loading: "Loading the model",
  generating: "Writing",
  paused: "Pausing: another song has its turn",
  waiting: "Waiting for its sound",
  decoding: "Turning into sound",
  storing: "Storing",
};
/** Why the player is silent. */
export const SILENCE = {
  lost: "The connection is lost. Trying again…",
  early: "Waiting for the first sound of the song…",
  dry: "Waiting for more of the song…",
  loading: "Loading…",
};
export const PHASES = [
  "the language model moves in",
  "songs are written",
  "the models change places",
  "songs turn into sound",
  "the codec moves out",
  "the encoder moves in",
  "recordings are encoded",
  "the encoder moves out",
];

/** The state of a song in words. */
export function doing(status, stage) {
  return STATUS[status] ?? STAGES[stage] ?? (status === "decoding" ? STAGES.decoding : STAGES.generating);
}

/** The name of a song: its title, else its first line or its tags. */
export function nameOf(request) {
  const line = request.lyrics.split("\n").map((text) => text.trim()).find((text) => text && !text.startsWith("["));
  return request.title || line || request.tags || "A song";
}

export function place(before) {
  if (before === 0) return "next in line";
  return before === 1 ? "1 song before it" : `${before} songs before it`;
}

/** Seconds as 1:05. */
export function clock(seconds) {
  const whole = Math.max(0, Math.round(seconds || 0));
  return `${Math.floor(whole / 60)}:${String(whole % 60).padStart(2, "0")}`;
}

/** Milliseconds as 1:05, with hundredths where there are any: what `milliseconds` reads. */
export function exact(ms) {
  const hundredths = Math.floor(Math.round(ms) / 10);
  const [whole, part] = [Math.floor(hundredths / 100), hundredths % 100];
  const rest = part ? `.${String(part).padStart(2, "0").replace(/0$/, "")}` : "";
  return `${Math.floor(whole / 60)}:${String(whole % 60).padStart(2, "0")}${rest}`;
}

/** The milliseconds of a moment such as 1:04, 64 or 64.5s; null for what is none. */
export function milliseconds(text) {
  const found = /^(?:(\d+):(?=[0-5]?\d(?:\D|$)))?(\d+(?:\.\d*)?)\s*s?$/.exec(text.trim());
  return found && Math.round((Number(found[1] ?? 0) * 60 + Number(found[2])) * 1000);
}

/** The time left until a moment, in words; "" when it has passed or is not known. */
export function until(time) {
  const seconds = (new Date(time) - Date.now()) / 1000;
  if (!(seconds > 1)) return "";
  return seconds < 90 ? `about ${Math.round(seconds)} s left` : `about ${Math.round(seconds / 60)} min left`;
}

/** A moment for which a song waits, in words. */
export function notBefore(time) {
  return `not before ${new Date(time).toLocaleString([], { dateStyle: "medium", timeStyle: "short" })}`;
}

/** What the player says of a song that will not be completed; "" for others. */
export function brokenOff(status, name) {
  if (status === "failed") return `“${name}” failed: there is no more of it.`;
  return status === "cancelled" ? `“${name}” was cancelled: there is no more of it.` : "";
}
