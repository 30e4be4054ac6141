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

let tools: { annotator: Annotator; bank: Bank } & Setup;

function label({ cells, drawn }: Batch) {
  const { about, annotator, bank, layouts } = tools;
  const { answers, full } = annotator.answer(cells);
  return { answers, full, layouts: positions(full, drawn, bank, about.widths, layouts) };
}

export function serve(): void {
  addEventListener("message", ({ data }: MessageEvent<Setup | Batch>) => {
    if ("cells" in data) return postMessage(label(data));
    tools = { ...data, annotator: annotatorOf(data.about, data.arrays), bank: bankOf(data.arrays.fractal) };
  });
}
