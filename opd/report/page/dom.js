// Making elements. Texts go in as text nodes, never as HTML: answers of a model are nobody's markup.
"use strict";

function make(tag, properties = {}, ...children) {
  const node = tag.startsWith("svg:")
    ? document.createElementNS("http://www.w3.org/2000/svg", tag.slice(4))
    : document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "key") node.style.setProperty("--key", value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

function number(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  return value.toFixed(digits).replace(/^-/, "−");
}

function percent(logProbability) {
  if (logProbability === null || logProbability === undefined) return "–";
  const share = 100 * Math.exp(logProbability);
  if (share < 0.001) return "< 0.001%";
  return `${share < 0.1 ? share.toFixed(3) : share >= 99.95 ? share.toFixed(2) : share.toFixed(1)}%`;
}

function flops(value) {
  const units = ["", "K", "M", "G", "T", "P", "E", "Z"];
  const power = Math.min(units.length - 1, Math.floor(Math.log10(Math.max(value, 1)) / 3));
  return `${(value / 1000 ** power).toPrecision(3)} ${units[power]}FLOP`;
}

// A token as it can be seen: spaces and line breaks get a sign.
function visible(text) {
  return text.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/^ | $/g, "␣") || "∅";
}
