// The waveform of a song: what was played, what can be heard, and what is still to come.

const BAR = 3; // CSS pixels from one bar to the next
const LEAST = 0.08; // of the height: a bar without peaks
const canvas = document.querySelector("#wave");
let peaks = null; // {sizes, seconds}: the amplitude of each stretch, at most 1, and how long a stretch is

/** One amplitude for the lowest and highest sample of each stretch. The largest is 1: quiet songs show a shape too. */
function amplitudes(data) {
  const found = [];
  for (let n = 0; n < data.length; n += 2) found.push(Math.max(-data[n], data[n + 1]));
  const largest = found.reduce((one, other) => Math.max(one, other), 1);
  return found.map((size) => size / largest);
}

/** Draw from these peaks, in the form of audiowaveform; null: there are none. */
export function setPeaks(found) {
  peaks = found && { sizes: amplitudes(found.data), seconds: found.samples_per_pixel / found.sample_rate };
}

function size(from, to) {
  if (!peaks) return LEAST;
  const first = Math.floor(from / peaks.seconds);
  const last = Math.max(first + 1, Math.floor(to / peaks.seconds));
  return Math.max(LEAST, ...peaks.sizes.slice(first, last));
}

/** A flag at `at`: where the song goes on from another one. */
function flag(paint, at, height, scale, colour) {
  const x = Math.round(at);
  const side = 7 * scale;
  paint.fillStyle = colour;
  paint.fillRect(x - scale, 0, 2 * scale, height);
  paint.beginPath();
  paint.moveTo(x, 0);
  paint.lineTo(x + side, side / 2);
  paint.lineTo(x, side);
  paint.fill();
}

/**
 * Draw a song of `whole` seconds of which `heard` can be heard, with all before `at` as played.
 * What is still to come is a dotted line behind an upright one. A flag marks the moment `join`, unless it is null.
 */
export function draw(at, heard, whole, join) {
  const scale = window.devicePixelRatio || 1;
  const width = Math.round(canvas.clientWidth * scale);
  const height = Math.round(canvas.clientHeight * scale);
  if (canvas.width !== width || canvas.height !== height) [canvas.width, canvas.height] = [width, height];
  const paint = canvas.getContext("2d");
  const style = getComputedStyle(canvas);
  const [accent, soft, faint, ink] = ["--accent", "--soft", "--faint", "--ink"].map((name) => style.getPropertyValue(name));
  const bar = BAR * scale;
  const edge = heard < whole ? (heard / whole) * width : width;
  paint.clearRect(0, 0, width, height);
  for (let x = 0; x < edge; x += bar) {
    const tall = height * (whole ? size((x / width) * whole, ((x + bar) / width) * whole) : LEAST);
    paint.fillStyle = whole && x < (at / whole) * width ? accent : soft;
    paint.fillRect(x, (height - tall) / 2, bar * 0.66, tall);
  }
  if (join !== null && whole) flag(paint, (join / whole) * width, height, scale, ink);
  if (edge === width) return;
  paint.fillStyle = faint;
  paint.fillRect(edge, height * 0.15, scale, height * 0.7);
  for (let x = edge + 2 * bar; x < width; x += 2 * bar) paint.fillRect(x, (height - scale) / 2, scale * 1.5, scale * 1.5);
}
