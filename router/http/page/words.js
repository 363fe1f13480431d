// Numbers as people read them.

/** Seconds: `0`, `0.4 ms`, `312 ms`, `2.1 s`, `3 min`. */
export function seconds(value) {
  if (value === null || value === undefined) return "–";
  if (value < 1e-5) return "0";
  if (value < 0.01) return `${(1000 * value).toFixed(1)} ms`;
  if (value < 0.9995) return `${Math.round(1000 * value)} ms`;
  if (value < 9.95) return `${value.toFixed(2)} s`;
  if (value < 99.5) return `${value.toFixed(1)} s`;
  return value < 600 ? `${Math.round(value)} s` : `${Math.round(value / 60)} min`;
}

/** A number and its unit apart, for where they look different. */
export function parts(text) {
  const [number, unit = ""] = text.split(" ");
  return [number, unit];
}

const PREFIXES = ["", "k", "M", "G", "T", "P"];

function scaled(value, unit) {
  let power = 0;
  while (value >= 999.5 && power < PREFIXES.length - 1) {
    value /= 1000;
    power += 1;
  }
  const digits = power === 0 || value >= 99.5 ? 0 : value >= 9.95 ? 1 : 2;
  return `${value.toFixed(digits)} ${PREFIXES[power]}${unit}`.trim();
}

/** Bytes: `368 kB`, `1.24 GB`. */
export const bytes = (value) => scaled(value, "B");

/** A count: `812`, `12.4 k`. */
export const count = (value) => (value < 10_000 ? String(Math.round(value)) : scaled(value, ""));

/** A share: `0 %`, `78 %`. */
export const share = (value) => (value === null || value === undefined ? "–" : `${Math.round(100 * value)} %`);

/** `1 block`, `2 blocks`. */
export const many = (number, word) => `${count(number)} ${word}${number === 1 ? "" : "s"}`;
