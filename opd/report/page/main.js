// Which view is shown, keys, and light or dark.
"use strict";

const state = { view: "run", measure: null, order: "step", kind: "all", find: "", sample: null, pair: 0 };

async function start() {
  const run = await readRun();
  state.measure = run.measures[0] || "penalty";
  state.open = (sample, t) => {
    Object.assign(state, { sample: sample.number, kind: "all", find: "" });
    go("answers");
    document.querySelector(".tokens")?.showToken?.(t);
  };
  const nav = document.querySelector("nav");
  const draw = () => {
    hideToken();
    const scrolled = document.querySelector(".list")?.scrollTop;
    for (const tab of nav.children) tab.setAttribute("aria-selected", String(tab.dataset.view === state.view));
    document.getElementById("view").replaceChildren(...[VIEWS[state.view][1](run, state, draw)].flat(2).filter(Boolean));
    const list = document.querySelector(".list");
    if (list && scrolled) list.scrollTop = scrolled;
    list?.querySelector("[aria-current]")?.scrollIntoView({ block: "nearest" });
  };
  const go = (view) => {
    if (location.hash !== `#${view}`) history.replaceState(null, "", `#${view}`);
    state.view = view;
    draw();
    scrollTo(0, 0);
  };
  for (const [view, [label]] of Object.entries(VIEWS)) {
    nav.append(make("button", { role: "tab", "data-view": view, onclick: () => go(view) }, label));
  }
  document.addEventListener("keydown", (event) => onKey(event, go, draw));
  window.addEventListener("hashchange", () => VIEWS[location.hash.slice(1)] && go(location.hash.slice(1)));
  go(VIEWS[location.hash.slice(1)] ? location.hash.slice(1) : "run");
}

function onKey(event, go, draw) {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, select")) return;
  const views = Object.keys(VIEWS);
  if (views[event.key - 1]) go(views[event.key - 1]);
  else if (event.key === "Escape") hideToken();
  else if (event.key === "t") switchTheme();
  else if (event.key === "j" || event.key === "k") step(event.key === "j" ? 1 : -1, draw);
}

function step(by, draw) {
  if (state.view === "changes") state.pair = Math.min(Math.max(0, state.pair + by), (state.paired || 1) - 1);
  else if (state.view === "answers") {
    const place = state.listed.indexOf(state.sample) + by;
    state.sample = state.listed[Math.min(Math.max(0, place), state.listed.length - 1)];
  } else return;
  draw();
}

function switchTheme() {
  const root = document.documentElement;
  root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark";
}

document.documentElement.dataset.theme = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
document.getElementById("theme").addEventListener("click", switchTheme);
start().catch((error) => {
  document.getElementById("view").replaceChildren(make("p", {}, `This page could not be shown: ${error.message}. It needs a browser of 2023 or later.`));
});
