// A worker labels dropped cells, a batch at a time, while the page stays free.

import type { Annotator } from "./annotator";
import { type About, annotatorOf, bankOf, type Matrix } from "./data";
import type { Bank } from "./neighbours";
import { positions } from "./positions";

/** What a worker gets first. */
export interface Setup {
  about: About;
  arrays: Record<string, Matrix>;
  layouts: Float32Array[]; // of the page's cells
}

/** What it gets then; it answers with what `label` returns. */
export interface Batch {
  cells: Float32Array; // (n, dim)
  drawn: boolean[]; // (n,) which of them get a position
}

export type Labels = ReturnType<typeof label>;

let tools: { annotator: Annotator; fractal: Bank; raw: Bank } & Setup;

function label({ cells, drawn }: Batch) {
  const { about, annotator, fractal, layouts, raw } = tools;
  const { answers, full } = annotator.answer(cells);
  const rows = [...drawn.keys()].filter((row) => drawn[row] && answers.path[row] >= 0);
  const [ofPrefixes, ofRaw] = [layouts.slice(0, about.widths.length), layouts.slice(about.widths.length)];
  const byPrefix = positions(full, rows, fractal, about.widths, ofPrefixes);
  const byRaw = ofRaw.length ? positions(cells, rows, raw, [raw.dim], ofRaw) : [];
  return { answers, full, layouts: [...byPrefix, ...byRaw] };
}

export function serve(): void {
  addEventListener("message", ({ data }: MessageEvent<Setup | Batch>) => {
    if ("cells" in data) return postMessage(label(data));
    const { about, arrays } = data;
    tools = { ...data, annotator: annotatorOf(about, arrays), fractal: bankOf(arrays.fractal), raw: bankOf(arrays.raw) };
  });
}
