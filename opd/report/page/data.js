// What the page shows: the run that html_report.py packed, and what is derived from it here.
"use strict";

async function readRun() {
  const packed = document.getElementById("data").textContent.trim();
  const bytes = Uint8Array.from(atob(packed), (letter) => letter.charCodeAt(0));
  const unpacked = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const run = await new Response(unpacked).json();
  run.samples.forEach((sample, number) => {
    sample.number = number;
    sample.prompt = run.prompts[sample.prompt];
    sample.texts = sample.tokens.map((token) => run.texts[token]);
    sample.surprise = sample.student?.map((value) => minus(0, value));
    sample.doubt = sample.teacher?.map((value) => minus(0, value));
    const pairs = sample.student && sample.teacher;
    sample.gap = pairs ? sample.student.map((value, t) => minus(value, sample.teacher[t])) : null;
    sample.meanGap = mean(sample.gap);
    sample.name = `step ${sample.step} · ${sample.evaluation ? "evaluation" : "rollout"} · number ${sample.index}`;
  });
  run.measures = Object.keys(MEASURES).filter((name) => run.samples.some((sample) => sample[name]));
  run.scales = Object.fromEntries(run.measures.map((name) => [name, scaleOf(run.samples, name)]));
  return run;
}

// name -> how it is called, what a large value means, whether both signs occur. Log-probs are in nats.
const MEASURES = {
  penalty: { label: "penalty", both: true, note: "coefficient × reverse KL, subtracted from the advantage" },
  gap: { label: "student − teacher", both: true, note: "log-probability, nats: the one-sample reverse KL" },
  surprise: { label: "student's surprise", both: false, note: "− log-probability of the student, nats" },
  doubt: { label: "teacher's surprise", both: false, note: "− log-probability of the teacher, nats" },
  entropy: { label: "student's entropy", both: false, note: "of its next-token distribution, nats" },
  teacherEntropy: { label: "teacher's entropy", both: false, note: "of its next-token distribution, nats" },
};

function minus(a, b) {
  return a === null || b === null ? null : a - b;
}

function known(values) {
  return (values || []).filter((value) => value !== null && value !== undefined);
}

function mean(values) {
  const numbers = known(values);
  return numbers.length ? numbers.reduce((sum, value) => sum + value, 0) / numbers.length : null;
}

// The colour is full where 99% of the run's values are below: a few outliers must not make the rest pale.
function scaleOf(samples, name) {
  const sizes = samples.flatMap((sample) => known(sample[name]).map(Math.abs)).sort((a, b) => a - b);
  return sizes.length ? sizes[Math.floor(0.99 * (sizes.length - 1))] || sizes[sizes.length - 1] || 1 : 1;
}

// Tokens of all samples, the largest value first: where the student wanted to go and the teacher did not.
function largestTokens(run, measure, count) {
  const all = [];
  for (const sample of run.samples) {
    (sample[measure] || []).forEach((value, t) => value !== null && all.push({ sample, t, value }));
  }
  return all.sort((a, b) => b.value - a.value).slice(0, count);
}

// By the token's text: how often it was written, and its sum and mean; the largest sum first.
function tokenKinds(run, measure, count) {
  const kinds = new Map();
  for (const sample of run.samples) {
    (sample[measure] || []).forEach((value, t) => {
      if (value === null) return;
      const kind = kinds.get(sample.texts[t]) || { text: sample.texts[t], times: 0, sum: 0 };
      kind.times += 1;
      kind.sum += value;
      kinds.set(kind.text, kind);
    });
  }
  return [...kinds.values()].sort((a, b) => b.sum - a.sum).slice(0, count);
}

// [first, last] answers to the same prompt, of two different steps; the largest change first.
function changes(run) {
  const byPrompt = new Map();
  for (const sample of run.samples) {
    const key = `${sample.evaluation} ${sample.prompt}`;
    if (!byPrompt.has(key)) byPrompt.set(key, []);
    byPrompt.get(key).push(sample);
  }
  const pairs = [];
  for (const group of byPrompt.values()) {
    const first = group.reduce((a, b) => (b.step < a.step ? b : a));
    const last = group.reduce((a, b) => (b.step > a.step ? b : a));
    if (first.step === last.step) continue;
    const reward = minus(last.reward, first.reward);
    pairs.push({ first, last, reward, gap: minus(last.meanGap, first.meanGap) });
  }
  const size = (pair) => Math.abs(pair.reward || 0) + Math.abs(pair.gap || 0);
  return pairs.sort((a, b) => size(b) - size(a));
}
