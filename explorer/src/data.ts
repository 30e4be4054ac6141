// What the package wrote into the page: facts as JSON, arrays as base64 of gzip of their byte planes.

import { Adapter } from "./adapter";
import { type Answers, Annotator, STATUSES, statusTexts } from "./annotator";
import { ramp } from "./colours";
import { find } from "./format";
import { normalize } from "./matrix";
import { Bank } from "./neighbours";

export interface TreeNode {
  name: string;
  parent: number; // row in `nodes`; -1: the root, which is row 0
  colour: string;
  id: string; // of the Cell Ontology, "" for none
  synonyms: string[];
}

/** A column of the cells: of text, which has `values`, or of numbers. */
export interface Column {
  name: string;
  values?: string[]; // a code is 1 + the row in it; 0 is missing
  low?: number; // of numbers: the 1st and the 99th percentile
  high?: number;
  colours?: string[]; // of the values
  missing?: string; // what stands for code 0
  explained?: string[]; // the values
  isOfAnswer?: boolean; // what the labels, their probabilities and the status say as well
  unit?: string; // of the expression, where the column is a gene
}

export type Knots = [number[], number[]];

export interface About {
  title: string;
  reference: string;
  cells: number;
  total: number; // cells of the file
  levels: string[];
  blocks: string[]; // the level that each block stands for
  widths: number[]; // numbers of each prefix
  nodes: TreeNode[]; // depth first
  unknown: string; // colour of cells without a label
  known: boolean; // labels are those of the file, not the reference's answers
  columns: Column[];
  genes: Required<Pick<Column, "name" | "low" | "high" | "unit">>[];
  names: string[] | null; // of the cells
  adapter: {
    levels: number;
    scaleDim: number; // numbers of a block
    classes: number[]; // per level
    blockScale: number[]; // per level, as the next two
    residualScale: number[];
    sharpness: number[];
  } & Record<"tau" | "meansShare" | "meansTemperature" | "typicalDistance", number>;
  annotator: {
    votes: Knots[]; // per level: share of the votes -> probability
    paths: number[][]; // nodes of each path, coarse to fine
    cells: number; // of the whole reference
  } & Record<"neighbours" | "temperature" | "softness" | "novel" | "caution" | "cautiousDepth" | "confidence", number>;
  facts: Record<string, string>;
}

/** Cells on the map: those of the page, or those that were dropped on it. */
export interface CellSet {
  names: string[] | null;
  node: Numbers; // (n,) the node of each cell
  layouts: Float32Array[]; // (n, 2) per prefix, and maybe one by the vectors as they came
  answers: Answers | null; // null where the labels are those of the file
  columns: CellColumn[];
}

/** Of text, with codes from 1 and 0 for missing; or the numbers themselves. */
export interface CellColumn extends Column {
  codes: Numbers;
}

/** What the page holds beside the map. */
export interface Vectors {
  fractal: Bank;
  raw: Bank;
  annotator: Annotator;
  arrays: Record<string, Matrix>; // of which the others are made
}

export type Numbers = Uint8Array | Uint16Array | Uint32Array | Int16Array | Float32Array | Float64Array;
const TYPES: Record<string, new (buffer: ArrayBuffer) => Numbers> = {
  uint8: Uint8Array, uint16: Uint16Array, uint32: Uint32Array, int16: Int16Array, float32: Float32Array, float64: Float64Array,
};

export interface Matrix {
  values: Numbers;
  shape: number[];
}

export const readAbout = () => JSON.parse(find("#about").textContent!) as About;

/** All arrays that the browser has come to, by name. Their text is dropped. */
export async function readArrays(): Promise<Record<string, Matrix>> {
  const elements = [...document.querySelectorAll<HTMLElement>("script[data-shape]")];
  return Object.fromEntries(await Promise.all(elements.map(async (element) => [element.id.slice(6), await readArray(element)])));
}

async function readArray(element: HTMLElement): Promise<Matrix> {
  const { type, shape } = element.dataset;
  const text = atob(element.textContent!);
  const zipped = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) zipped[i] = text.charCodeAt(i);
  element.remove();
  const stream = new Blob([zipped]).stream().pipeThrough(new DecompressionStream("gzip"));
  const planes = new Uint8Array(await new Response(stream).arrayBuffer());
  const bytes = new Uint8Array(planes.length);
  const count = shape!.split(",").reduce((product, size) => product * Number(size), 1);
  const size = planes.length / count;
  for (let k = 0; k < size; k++) {
    for (let i = 0, from = k * count, to = k; i < count; i++, from++, to += size) bytes[to] = planes[from];
  }
  return { values: new TYPES[type!](bytes.buffer), shape: shape!.split(",").map(Number) };
}

/** The cells of the page. */
export function cellsOf(about: About, arrays: Record<string, Matrix>): CellSet {
  const { columns, genes, names } = about;
  const maps = Float32Array.from(arrays.maps.values, (value) => value / 32_000);
  const [count, cells] = arrays.maps.shape;
  const layouts = Array.from({ length: count }, (_, j) => maps.subarray(2 * j * cells, 2 * (j + 1) * cells));
  const answers = arrays.answer_path ? {
    path: Int32Array.from(arrays.answer_path.values),
    probability: Float64Array.from(arrays.answer_probability.values, (value) => value / 10_000),
    depth: Uint8Array.from(arrays.answer_depth.values),
    pValue: Float64Array.from(arrays.answer_p_value.values),
    status: Uint8Array.from(arrays.answer_status.values),
  } : null;
  const ofFile = columns.map((column, i) => ({ ...column, codes: arrays[`column_${i}`].values }));
  const ofGenes = genes.map((gene, i) => {
    const bytes = arrays.genes.values.subarray(i * arrays.genes.shape[1], (i + 1) * arrays.genes.shape[1]);
    return { ...gene, codes: Float32Array.from(bytes, (byte) => gene.low + (byte / 255) * (gene.high - gene.low)) };
  });
  const ofAnswers = answers ? answerColumns(answers, about) : [];
  return { names, node: arrays.node.values, layouts, answers, columns: [...ofAnswers, ...ofFile, ...ofGenes] };
}

/** What the answers say, as columns that colour cells. */
export function answerColumns({ status, depth, path, probability, pValue }: Answers, about: About): CellColumn[] {
  const { levels, nodes } = about;
  const guesses = about.annotator.paths.map((nodesOfPath) => nodes[nodesOfPath[levels.length - 1]]); // however unsure
  const ofLevel = (k: number) => Float64Array.from(status, (_, row) => probability[row * levels.length + k]);
  const colours = ["#009e73", "#e69f00", "#d81b60", "#8a8a8a"];
  const finest = levels[levels.length - 1];
  const ofGuess = { values: guesses.map(({ name }) => name), colours: guesses.map(({ colour }) => colour) };
  const isUnsure = (row: number) => depth[row] < levels.length;
  const made: CellColumn[] = [
    { name: "status", values: [...STATUSES], colours, explained: statusTexts(about), codes: status.map((code) => code + 1) },
    {
      name: "answered level", values: levels, colours: levels.map((_, k) => ramp(k / levels.length)),
      missing: "no answer", codes: depth,
    },
    { name: "best guess", ...ofGuess, codes: Uint16Array.from(path, (p) => p + 1) },
    {
      name: `unsure ${finest}, best guess`, ...ofGuess, missing: `the ${finest} is answered`,
      codes: Uint16Array.from(path, (p, row) => (isUnsure(row) ? p + 1 : 0)),
    },
    ...levels.map((level, k) => ({ name: `probability of the ${level}`, low: 0, high: 1, codes: ofLevel(k) })),
    { name: "p-value", low: 0, high: 1, codes: pValue },
  ];
  return made.map((column, i) => ({ ...column, isOfAnswer: i > 0 }));
}

/** The vectors, a hundred times larger than the rest: they stand behind the script. */
export async function readVectors(about: About): Promise<Vectors> {
  if (document.readyState === "loading") {
    await new Promise((resolve) => document.addEventListener("DOMContentLoaded", resolve, { once: true }));
  }
  const arrays = await readArrays();
  return { fractal: bankOf(arrays.fractal), raw: bankOf(arrays.raw), annotator: annotatorOf(about, arrays), arrays };
}

export const bankOf = ({ values, shape }: Matrix) => new Bank(normalize(Float32Array.from(values), shape[1]), shape[1]);

export const annotatorOf = ({ adapter, annotator }: About, arrays: Record<string, Matrix>) =>
  new Annotator(new Adapter(adapter, arrays), annotator, bankOf(arrays.bank), arrays);
