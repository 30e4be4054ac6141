// Cells that were dropped on the page: labelled by workers, put on the map, and saved as a table.

import { rollup } from "d3-array";
import { type Answers, noAnswers, problemOf, STATUSES } from "./annotator";
import { type About, answerColumns, type CellSet, type Vectors } from "./data";
import type { Dropped } from "./files";
import { downloadCsv } from "./download";
import { find } from "./format";
import { rowOf } from "./matrix";
import type { Tree } from "./tree";
import type { Labels } from "./worker";

export interface Yours extends CellSet, Omit<Dropped, "vectors"> {
  file: string;
  problems: Map<string, number>; // cells that get no answer, by what is wrong
  raw: Float32Array; // (n, dim) as they came
  full: Float32Array; // (n, width) fractal vectors
  answers: Answers;
}

export const MOST = 20_000; // cells that are drawn
const BATCH = 64;
const WORKERS = 8; // at most; each holds the voters and the cells of the map, 30 MB

/**
 * Label the cells of a file on all cores: a worker gets the next batch when it has done one. progress: gets the share
 * that is done, and stops the work by returning false; the result is null then.
 */
export async function labelled(
  file: string, { vectors: raw, names, what }: Dropped, about: About, vectors: Vectors, layouts: Float32Array[],
  progress: (share: number) => boolean,
): Promise<Yours | null> {
  const { dim, width } = vectors.annotator.adapter;
  const n = raw.length / dim;
  const answers = noAnswers(n, about.levels.length);
  const full = new Float32Array(n * width);
  const placed = layouts.map(() => new Float32Array(2 * n));
  const source = URL.createObjectURL(new Blob([find("script:not([type])").textContent!])); // see main.tsx
  let next = 0;
  let isStopped = false;
  const work = async () => {
    const worker = new Worker(source);
    const ask = (batch: object) =>
      new Promise<Labels>((done, fail) => {
        worker.onmessage = ({ data }) => done(data);
        worker.onerror = ({ message }) => {
          isStopped = true;
          fail(new Error(message));
        };
        worker.postMessage(batch);
      });
    worker.postMessage({ about, arrays: vectors.arrays, layouts });
    for (let start = next; start < n && !isStopped; start = next) {
      next = Math.min(n, start + BATCH);
      const drawn = Array.from({ length: next - start }, (_, i) => ((start + i) * MOST) % n < MOST); // MOST of all, evenly
      const labels = await ask({ cells: raw.slice(start * dim, next * dim), drawn });
      for (const key of Object.keys(answers) as (keyof Answers)[]) {
        answers[key].set(labels.answers[key], (start * answers[key].length) / n);
      }
      full.set(labels.full, start * width);
      labels.layouts.forEach((layout, j) => placed[j].set(layout, 2 * start));
      isStopped ||= !progress(next / n);
    }
    worker.terminate();
  };
  await Promise.all(Array.from({ length: Math.min(WORKERS, navigator.hardwareConcurrency || 1) }, work));
  URL.revokeObjectURL(source);
  if (isStopped) return null;
  const invalid = [...answers.path.keys()].filter((row) => answers.path[row] < 0);
  const problems = rollup(invalid, (rows) => rows.length, (row) => problemOf(rowOf(raw, row, dim)));
  const node = nodesOf(answers, about.annotator.paths);
  return { file, what, problems, names, raw, full, answers, node, layouts: placed, columns: answerColumns(answers, about) };
}

/** The deepest node that is answered for each cell, 0 for none. */
const nodesOf = ({ path, depth }: Answers, paths: number[][]) =>
  Uint32Array.from(path, (p, row) => (p < 0 || !depth[row] ? 0 : paths[p][depth[row] - 1]));

/** Save the columns of `fractal annotate`, as far as the page knows them. */
export function save({ answers, names, node }: Yours, { levels, annotator }: About, tree: Tree): void {
  const ofLevels = levels.flatMap((level) => [level, `${level}_cl_id`, `${level}_probability`]);
  const digits = (value: number) => Number(value.toPrecision(6));
  const rows = Array.from(node, (deepest, i) => {
    const path = annotator.paths[answers.path[i]] ?? levels.map(() => 0); // the root has no name
    const labels = path.flatMap((step, k) => {
      return [tree.nodes[step].name, tree.nodes[step].id, digits(answers.probability[i * levels.length + k])];
    });
    const { name, id } = tree.nodes[deepest];
    const level = answers.depth[i] ? levels[answers.depth[i] - 1] : "none";
    return [names?.[i] ?? String(i), level, name, id, ...labels, digits(answers.pValue[i]), STATUSES[answers.status[i]]];
  });
  downloadCsv("labels.csv", ["cell_id", "level", "label", "cl_id", ...ofLevels, "p_value", "status"], rows);
}
