// Elements, made by few words.

const SVG = "http://www.w3.org/2000/svg";

/** An element with attributes (`text` is its text, a falsy one is left out) and children. */
export function make(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

/** As `make`, of an SVG. */
export function draw(tag, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

function filled(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "text") element.textContent = value;
    else if (value !== undefined && value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** The element of this id. */
export const at = (id) => document.getElementById(id);

/** Sets a text only if it is another one: what screen readers watch is not said again. */
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Parts side by side that fill a width: `[class, share, title]`, shares from 0 to 1. */
export function bar(parts, label) {
  let left = 0;
  const rects = parts.map(([name, share, title]) => {
    const rect = draw("rect", { class: name, x: percent(left), width: percent(share), height: "100%" });
    if (title) rect.append(draw("title", { text: title }));
    left += share;
    return rect;
  });
  return draw("svg", { class: "bar", role: "img", "aria-label": label }, ...rects);
}

export const percent = (share) => `${(100 * Math.max(0, Math.min(1, share))).toFixed(2)}%`;
