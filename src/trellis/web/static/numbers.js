// Numbers as the reader's locale writes them; `web/numbers.py` has the same functions for what the server writes.

const UNKNOWN = "–";
const locale = document.documentElement.dataset.locale || "en";
const isKnown = (value) => value !== null && value !== undefined && Number.isFinite(Number(value));
const formats = new Map();

function write(value, style, digits) {
  if (!isKnown(value)) return UNKNOWN;
  const key = `${style} ${digits}`;
  if (!formats.has(key)) {
    const decimals = digits === null ? { maximumFractionDigits: 20 } : { minimumFractionDigits: digits, maximumFractionDigits: digits };
    formats.set(key, new Intl.NumberFormat(locale, { style, useGrouping: "always", signDisplay: "negative", numberingSystem: "latn", ...decimals }));
  }
  return formats.get(key).format(value);
}

function scaled(value, units) {
  let amount = Number(value), unit = 0;
  while (amount >= 999.5 && unit < units.length - 1) { amount /= 1000; unit += 1; }
  return [amount, unit];
}

/** `1,024` or `0.0003`; with `digits`, rounded to that many decimals. */
export const number = (value, digits = null) => write(value, "decimal", digits);

/** `74%` from `0.74`. */
export const percent = (value, digits = 0) => write(value, "percent", digits);

/** Three digits and a letter: `2.26M`. */
export function compact(value) {
  if (!isKnown(value)) return UNKNOWN;
  const [amount, unit] = scaled(value, ["", "K", "M", "B", "T"]);
  return unit ? number(amount, (amount < 99.95) + (amount < 9.995)) + ["", "K", "M", "B", "T"][unit] : number(value);
}

/** `1.6×`, and from ten on `12×`. */
export const factor = (value) => isKnown(value) ? `${number(value, value < 9.95 ? 1 : 0)}×` : UNKNOWN;

/** Bytes: `5.1 GB`. */
export function size(value) {
  if (!isKnown(value)) return UNKNOWN;
  const units = ["bytes", "kB", "MB", "GB", "TB"];
  const [amount, unit] = scaled(value, units);
  return `${number(amount, unit && amount < 99.95 ? 1 : 0)} ${units[unit]}`;
}

/** `312 ms`, `1.2 s`, `45 s`, `2 min 5 s`, `3 h 20 min`. */
export function duration(milliseconds) {
  if (!isKnown(milliseconds)) return UNKNOWN;
  if (milliseconds < 999.5) return `${number(milliseconds, 0)} ms`;
  if (milliseconds < 59_500) return `${number(milliseconds / 1000, milliseconds < 9950 ? 1 : 0)} s`;
  const seconds = Math.floor(milliseconds / 1000 + 0.5), minutes = Math.floor(seconds / 60), hours = Math.floor(minutes / 60);
  const parts = hours ? [[hours, "h"], [minutes % 60, "min"]] : [[minutes, "min"], [seconds % 60, "s"]];
  return parts.filter(([amount]) => amount).map(([amount, unit]) => `${number(amount)} ${unit}`).join(" ");
}
