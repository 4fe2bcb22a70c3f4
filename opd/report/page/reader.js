// One answer, token by token, and the panel about the token that is pointed at.
"use strict";

function sampleView(run, sample, state, heading) {
  const facts = [
    sample.reward === null ? null : `reward ${number(sample.reward, 2)}`,
    `${sample.tokens.length} tokens`,
    sample.meanGap === null ? null : `mean reverse KL ${number(sample.meanGap)} nats/token`,
    sample.status,
    sample.offPolicy ? "from a file" : null,
    sample.label ? `expected: ${sample.label}` : null,
  ];
  return make("section", { class: "sample" },
    make("h2", {}, heading || sample.name),
    make("div", { class: "faint" }, facts.filter(Boolean).join(" · ")),
    make("div", { class: "prompt" }, sample.prompt),
    tokensView(run, sample, state));
}

function tokensView(run, sample, state) {
  const values = sample[state.measure];
  const box = make("div", { class: "tokens", tabindex: 0, role: "group", "aria-label": `answer, ${sample.name}` });
  if (!sample.tokens.length) box.append(make("span", { class: "mark" }, "an empty answer"));
  const spans = sample.texts.map((text, t) => {
    const value = values ? values[t] : null;
    // the root: a nat of disagreement has to be seen beside ten
    const size = value === null || value === undefined ? 0 : Math.sqrt(Math.min(1, Math.abs(value) / run.scales[state.measure]));
    const colour = value > 0 ? "var(--against)" : "var(--for)";
    const span = make("span", { "data-token": t, class: size === 1 ? "strong" : null });
    if (size > 0.1) span.style.background = `rgba(${colour}, ${(0.85 * size).toFixed(3)})`;
    span.append(text.includes("\n") ? text.replace(/\n/g, "⏎\n") : text || make("i", { class: "mark" }, "∅"));
    return span;
  });
  box.append(...spans);
  const show = (t, hovered = false) => {
    document.querySelectorAll(".tokens .active").forEach((span) => span.classList.remove("active"));
    spans[t].classList.add("active");
    box.dataset.active = t;
    showToken(run, sample, t);
    if (!hovered) spans[t].scrollIntoView({ block: "nearest" }); // from behind the panel; under a mouse nothing may move
  };
  const under = (event) => event.target.closest("[data-token]");
  box.addEventListener("pointerover", (event) => event.pointerType === "mouse" && under(event) && show(Number(under(event).dataset.token), true));
  box.addEventListener("click", (event) => under(event) && show(Number(under(event).dataset.token)));
  box.addEventListener("keydown", (event) => {
    const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!move || !spans.length) return;
    event.preventDefault();
    const now = box.dataset.active === undefined ? (move > 0 ? -1 : spans.length) : Number(box.dataset.active);
    show(Math.min(spans.length - 1, Math.max(0, now + move)));
  });
  box.showToken = show;
  return box;
}

function showToken(run, sample, t) {
  const row = (label, value, more) => make("tr", {}, make("td", {}, label), make("td", {}, value), make("td", { class: "faint" }, more || ""));
  const at = (values) => (values ? values[t] : undefined);
  const logprob = (label, values) => (at(values) === undefined ? null : row(label, percent(at(values)), `log ${number(at(values))}`));
  const nats = (label, values, note) => (at(values) === undefined ? null : row(label, number(at(values)), note));
  const panel = document.getElementById("detail");
  panel.replaceChildren(
    make("button", { class: "close", "aria-label": "Close", onclick: hideToken }, "×"),
    make("div", { class: "columns" },
      make("div", {},
        make("code", {}, visible(sample.texts[t])), ` token ${t + 1} of ${sample.tokens.length}`,
        make("div", { class: "faint" }, `id ${sample.ids[t]} · ${sample.name}`)),
      make("table", {}, make("tbody", {},
        logprob("student", sample.student), logprob("teacher", sample.teacher),
        logprob(sample.mixed ? "mixture" : "when written", sample.written))),
      make("table", {}, make("tbody", {},
        nats("student − teacher", sample.gap, "nats"), nats("penalty", sample.penalty, ""),
        nats("student's entropy", sample.entropy, "nats"), nats("teacher's entropy", sample.teacherEntropy, "nats"))),
      alternatives("student's likeliest", at(sample.studentTop), sample.tokens[t], run),
      alternatives("teacher's likeliest", at(sample.teacherTop), sample.tokens[t], run)));
  panel.hidden = false;
  document.body.classList.add("detailed");
}

// top: [token, log-prob, token, log-prob, ...], likeliest first; what was written is marked.
function alternatives(label, top, written, run) {
  if (!top) return null;
  const rows = [];
  for (let k = 0; k < top.length; k += 2) {
    const text = make("code", { class: top[k] === written ? "written" : null }, visible(run.texts[top[k]]));
    rows.push(make("tr", {}, make("td", {}, text), make("td", { class: "number" }, percent(top[k + 1]))));
  }
  return make("div", {}, make("span", { class: "faint" }, label), make("table", {}, make("tbody", {}, rows)));
}

function hideToken() {
  document.getElementById("detail").hidden = true;
  document.body.classList.remove("detailed");
}

function measurePicker(run, state, redraw) {
  const options = run.measures.map((name) => make("option", { value: name, selected: name === state.measure }, MEASURES[name].label));
  const measure = MEASURES[state.measure];
  const full = number(run.scales[state.measure], 2);
  return [
    make("label", {}, "shade by ", make("select", { onchange: (event) => { state.measure = event.target.value; redraw(); } }, options)),
    make("span", { class: measure.both ? "legend" : "legend single" }, measure.both ? `−${full}` : "0", make("i"), `${full}`),
    make("span", { class: "faint" }, measure.note),
  ];
}
