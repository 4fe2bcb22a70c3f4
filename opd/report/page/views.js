// The four pages: the run, its answers, its most penalised tokens, what changed.
"use strict";

const VIEWS = { run: ["Run", runView], answers: ["Answers", answersView], tokens: ["Tokens", tokensPage], changes: ["Before and after", changesView] };

function runView(run) {
  const column = (name) => run.rows.step.map((step, k) => [step, (run.rows[name] || [])[k]]).filter((point) => point[1] !== null && point[1] !== undefined);
  const noisy = (name, label) => [{ name: label, points: column(name), faint: true }, { name: "average of 5", points: smoothed(column(name)), colour: COLOURS[0] }];
  const charts = [
    lineChart({ title: "Evaluation", unit: "%", from: 0, to: 100, digits: 1, lines: run.accuracies.map(({ name, points }) => ({ name, points: points.map(([step, value]) => [step, 100 * value]) })) }),
    lineChart({ title: "Reverse KL(student ‖ teacher)", unit: "nats/token", lines: noisy("opd_reverse_kl", "each step") }),
    lineChart({ title: "Reward of the rollouts", unit: "mean", lines: noisy("reward_mean", "each step") }),
    stackedChart({ title: "Time per step", unit: "s", layers: run.times.phases.map((phase) => ({ name: phase, points: run.times.steps.map((step, k) => [step, run.times[phase][k]]) })) }),
    lineChart({ title: "Response length", unit: "tokens", digits: 1, lines: noisy("response_length_mean", "each step") }),
    lineChart({ title: "Gradient norm", unit: "", lines: noisy("grad_norm", "each step") }),
    lineChart({ title: "Entropy", unit: "nats/token", lines: [{ name: "student", points: column("student_entropy") }, { name: "teacher", points: column("teacher_entropy") }] }),
    lineChart({ title: "Engine against trainer", unit: "nats/token", digits: 6, lines: [{ name: "mean gap of log-probs", points: column("logprob_mismatch_mean") }] }),
  ];
  return [
    run.headline.map((line) => make("p", { class: "headline" }, line)),
    make("p", { class: "faint" }, run.counts.join(" · ")),
    make("div", { class: "charts" }, charts),
    make("div", { class: "charts" }, timeTable(run), costTable(run)),
    run.flags.length ? flagsTable(run) : null,
  ];
}

function timeTable(run) {
  const phases = run.times.phases.map((name) => ({ name, seconds: run.times[name].reduce((a, b) => a + b, 0) })).filter((phase) => phase.seconds > 0);
  const whole = phases.reduce((sum, phase) => sum + phase.seconds, 0);
  if (!whole) return null;
  const parts = phases.map(({ name, seconds }) => [name, seconds, `${number(seconds, 1)} s`]);
  return sharesTable(`Where ${number(whole, 1)} seconds went`, parts, null);
}

function costTable(run) {
  if (!run.operations.length) return null;
  const whole = run.operations.reduce((sum, part) => sum + part[1], 0);
  const used = run.utilisation.map(([phase, share]) => `${phase} ${number(100 * share, 1)}%`).join(", ");
  const parts = run.operations.map(([name, value]) => [name, value, flops(value)]);
  return sharesTable(`What ${flops(whole)} went into`, parts, used ? `of the devices' peak: ${used}` : null);
}

// parts: [[name, size, text], ...]
function sharesTable(title, parts, note) {
  const whole = parts.reduce((sum, part) => sum + part[1], 0);
  const bar = parts.map(([name, size], k) => make("span", { style: `flex: ${size}`, key: COLOURS[k % 6], title: name }));
  const rows = parts.map(([name, size, text], k) => make("tr", {},
    make("td", {}, make("span", { class: "key", key: COLOURS[k % 6] }, name)), make("td", { class: "number" }, text),
    make("td", { class: "number" }, `${number((100 * size) / whole, 0)}%`)));
  return make("figure", {}, make("figcaption", {}, make("strong", {}, title)), make("div", { class: "bar" }, bar),
    make("table", {}, make("tbody", {}, rows)), note ? make("div", { class: "faint" }, note) : null);
}

function flagsTable(run) {
  return [
    make("h2", {}, "Flags that are not at their default"),
    make("div", { class: "wide" }, make("table", {}, make("tbody", {}, run.flags.map(([name, value]) => make("tr", {}, make("td", {}, name), make("td", {}, value)))))),
  ];
}

function answersView(run, state, redraw) {
  if (!run.samples.length) return nothing("No answers were saved: --num-saved-samples is 0.");
  const kinds = [...new Set(run.samples.map((sample) => (sample.evaluation ? "evaluation" : "rollout")))];
  const shown = run.samples.filter((sample) => matches(sample, state)).sort(ORDERS[state.order][1]);
  if (!shown.some((sample) => sample.number === state.sample)) state.sample = shown.length ? shown[0].number : null;
  const choose = (name, options) => make("select", { "aria-label": name, onchange: (event) => { state[name] = event.target.value; redraw(); } },
    options.map(([value, label]) => make("option", { value, selected: value === state[name] }, label)));
  const list = make("div", { class: "list", role: "listbox", "aria-label": "answers" }, shown.slice(0, 1000).map((sample) => listEntry(sample, state, redraw)));
  state.listed = shown.map((sample) => sample.number);
  return [
    make("div", { class: "tools" },
      choose("order", Object.entries(ORDERS).map(([value, [label]]) => [value, label])),
      kinds.length > 1 ? choose("kind", [["all", "rollouts and evaluations"], ...kinds.map((kind) => [kind, kind])]) : null,
      make("input", { type: "search", placeholder: "find text", "aria-label": "find text", value: state.find, onchange: (event) => { state.find = event.target.value; redraw(); } }),
      measurePicker(run, state, redraw)),
    make("div", { class: "split" },
      make("div", {}, list, make("p", { class: "faint keys" }, `${shown.length} answers`, run.left_out ? `, ${run.left_out} more left out for size` : "", " · ", make("kbd", {}, "j"), " ", make("kbd", {}, "k"), " next, previous · ", make("kbd", {}, "←"), " ", make("kbd", {}, "→"), " within an answer")),
      state.sample === null ? nothing("No answer fits.") : sampleView(run, run.samples[state.sample], state)),
  ];
}

const ORDERS = {
  step: ["by step", (a, b) => a.step - b.step || a.evaluation - b.evaluation || a.index - b.index],
  latest: ["latest first", (a, b) => b.step - a.step || a.index - b.index],
  gap: ["highest mean reverse KL", (a, b) => (b.meanGap ?? -Infinity) - (a.meanGap ?? -Infinity)],
  reward: ["lowest reward", (a, b) => (a.reward ?? Infinity) - (b.reward ?? Infinity)],
  length: ["longest", (a, b) => b.tokens.length - a.tokens.length],
};

function matches(sample, state) {
  if (state.kind !== "all" && (state.kind === "evaluation") !== sample.evaluation) return false;
  const wanted = state.find.toLowerCase();
  return !wanted || sample.prompt.toLowerCase().includes(wanted) || sample.response.toLowerCase().includes(wanted);
}

function listEntry(sample, state, redraw) {
  const facts = [`step ${sample.step}`, sample.reward === null ? null : `reward ${number(sample.reward, 2)}`, sample.meanGap === null ? null : `KL ${number(sample.meanGap)}`];
  return make("button", {
    role: "option", "aria-current": sample.number === state.sample ? "true" : null, "data-number": sample.number,
    onclick: () => { state.sample = sample.number; redraw(); },
  }, make("span", { class: "prompt" }, sample.prompt.replace(/\s+/g, " ")), make("span", { class: "facts" }, facts.filter(Boolean).join(" · ")));
}

function tokensPage(run, state, redraw) {
  if (!run.measures.length) return nothing("No log-probs were saved with the answers.");
  const largest = largestTokens(run, state.measure, 100);
  const kinds = tokenKinds(run, state.measure, 40);
  return [
    make("div", { class: "tools" }, measurePicker(run, state, redraw)),
    make("h2", {}, "Single tokens, the largest first"),
    make("div", { class: "wide" }, make("table", {},
      make("thead", {}, make("tr", {}, ["value", "student", "teacher", "in its answer", "where"].map((name, k) => make("th", { class: k < 3 ? "number" : null }, name)))),
      make("tbody", {}, largest.map(({ sample, t, value }) => make("tr", { class: "link", tabindex: 0, onclick: () => state.open(sample, t), onkeydown: (event) => event.key === "Enter" && state.open(sample, t) },
        make("td", { class: "number" }, number(value)), make("td", { class: "number" }, percent(sample.student?.[t])), make("td", { class: "number" }, percent(sample.teacher?.[t])),
        make("td", { class: "context" }, context(sample, t)), make("td", { class: "faint" }, `step ${sample.step}`)))))),
    make("h2", {}, "By the token's text, the largest sum first"),
    make("div", { class: "wide" }, make("table", {},
      make("thead", {}, make("tr", {}, ["token", "times", "mean", "sum"].map((name, k) => make("th", { class: k ? "number" : null }, name)))),
      make("tbody", {}, kinds.map((kind) => make("tr", {}, make("td", { class: "context" }, visible(kind.text)),
        make("td", { class: "number" }, kind.times), make("td", { class: "number" }, number(kind.sum / kind.times)), make("td", { class: "number" }, number(kind.sum, 2))))))),
  ];
}

function context(sample, t) {
  const text = (from, to) => sample.texts.slice(from, to).join("").replace(/\n/g, "⏎");
  return [t > 12 ? "… " : "", text(Math.max(0, t - 12), t), make("mark", {}, visible(sample.texts[t])), text(t + 1, t + 9), t + 9 < sample.texts.length ? " …" : ""];
}

function changesView(run, state, redraw) {
  const pairs = run.pairs ??= changes(run);
  if (!pairs.length) return nothing("No prompt was answered at two different steps. Evaluations answer the same prompts each time: give --eval-prompt-data and --eval-interval.");
  const pair = pairs[Math.min(state.pair, pairs.length - 1)];
  state.paired = pairs.length;
  const entry = ({ first, last, reward, gap }, k) => make("button", { role: "option", "aria-current": pairs[k] === pair ? "true" : null, onclick: () => { state.pair = k; redraw(); } },
    make("span", { class: "prompt" }, first.prompt.replace(/\s+/g, " ")),
    make("span", { class: "facts" }, `step ${first.step} → ${last.step}`,
      reward ? make("span", { class: reward > 0 ? "good" : "bad" }, ` · reward ${number(first.reward, 2)} → ${number(last.reward, 2)}`) : null,
      gap === null ? null : ` · KL ${number(first.meanGap, 2)} → ${number(last.meanGap, 2)}`));
  return [
    make("div", { class: "tools" }, measurePicker(run, state, redraw)),
    make("div", { class: "split" },
      make("div", {}, make("div", { class: "list", role: "listbox", "aria-label": "prompts" }, pairs.slice(0, 1000).map(entry)), make("p", { class: "faint keys" }, `${pairs.length} prompts, the largest change first`)),
      make("div", {}, sampleView(run, pair.first, state, `Before · ${pair.first.name}`), sampleView(run, pair.last, state, `After · ${pair.last.name}`))),
  ];
}

function nothing(text) {
  return make("p", { class: "faint" }, text);
}
