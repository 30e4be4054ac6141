// A dropped file -> vectors: CSV and TSV, Parquet, .npy. An Error's message says in one line what does not fit.

import { gunzipSync } from "fflate";
import { decompress } from "fzstd";
import { parquetMetadataAsync, parquetReadObjects, parquetSchema } from "hyparquet";
import Papa from "papaparse";

export interface Dropped {
  vectors: Float32Array; // (n, dim), NaN for missing numbers
  names: string[] | null; // of the cells
  what: string; // was read, and what was not
}

const NAMES = ["cell_id", "obs_names", "index", "__index_level_0__"]; // columns that name the cells
const KINDS = "CSV, TSV, Parquet and .npy files are read here";

/** A file of vectors of `dim` numbers; `rep` is their key in the obsm of an AnnData. */
export async function readFile(file: File, dim: number, rep: string): Promise<Dropped> {
  if (file.size === 0) throw new Error("it is empty");
  const kind = file.name.toLowerCase().split(".").pop();
  const bytes = await file.arrayBuffer();
  const read = async () => {
    if (kind === "npy") return readNpy(bytes, dim);
    if (kind === "parquet" || kind === "pq") return readParquet(bytes, dim);
    if (kind === "csv" || kind === "tsv" || kind === "txt") return readText(new TextDecoder().decode(bytes), dim);
    throw new Error(kind === "h5ad" ? `${KINDS}; ${csvOf(file.name, rep)}` : KINDS);
  };
  const dropped = await read();
  if (!dropped.vectors.length) throw new Error("it holds no cell");
  return dropped;
}

/** The command that makes of an .h5ad a file that is read. */
function csvOf(name: string, rep: string): string {
  const quoted = (text: string) => JSON.stringify(text).replaceAll("'", "\\u0027");
  const output = quoted(name.replace(/h5ad$/i, "csv"));
  const frame = `pandas.DataFrame(a.obsm[${quoted(rep)}], a.obs_names)`;
  const code = `import anndata, pandas; a = anndata.read_h5ad(${quoted(name)}); ${frame}.to_csv(${output})`;
  return `this makes one of it: python -c '${code}'`;
}

function mismatch(width: number, dim: number): Error {
  return new Error(`it has ${width} numbers a cell, the reference takes ${dim}: vectors of the same embedding`);
}

/** The columns of numbers are those whose second line is one; the first other column names the cells. */
function readText(text: string, dim: number): Dropped {
  const { data } = Papa.parse<string[]>(text.replace(/^\uFEFF/, ""), { skipEmptyLines: "greedy" });
  if (!data.length) throw new Error("it holds no cell");
  const isNumber = (value: string) => /^\s*([-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?|[-+]?(nan|inf|infinity)|)\s*$/i.test(value);
  const sample = data[Math.min(1, data.length - 1)];
  let columns = sample.map((_, k) => k).filter((k) => isNumber(sample[k]));
  // A first column of row numbers, as pandas writes its index, is no part of the vector.
  const isIndexed = columns[0] === 0 && (!data[0][0].trim() || NAMES.includes(data[0][0]));
  if (isIndexed) columns = columns.slice(1);
  const top = columns.map((k) => data[0][k]);
  const isCounted = top.length > 1 && top.every((value, k) => Number(value) === Number(top[0]) + k); // 0, 1, 2, ...
  const hasHeader = isIndexed || isCounted || top.some((value) => !isNumber(value));
  if (columns.length !== dim) throw mismatch(columns.length, dim);
  const rows = hasHeader ? data.slice(1) : data;
  const vectors = new Float32Array(rows.length * dim);
  rows.forEach((row, i) => {
    const line = i + 1 + data.length - rows.length;
    if (row.length !== sample.length) throw new Error(`line ${line} has ${row.length} fields, not ${sample.length}`);
    columns.forEach((column, k) => {
      const value = row[column].trim();
      vectors[i * dim + k] = value === "" ? NaN : /inf/i.test(value) ? Infinity : Number(value);
    });
  });
  const named = isIndexed ? 0 : sample.findIndex((value) => !isNumber(value));
  const others = sample.map((_, k) => k).filter((k) => k !== named && !columns.includes(k));
  const title = (k: number) => (hasHeader && data[0][k].trim() ? `'${data[0][k]}'` : `number ${k + 1}`);
  const what = `${dim} columns of numbers${named < 0 ? "" : `, names from column ${title(named)}`}${left(others.map(title))}`;
  return { vectors, names: named < 0 ? null : rows.map((row) => row[named]), what };
}

const left = (columns: string[]) => {
  const shown = [...columns.slice(0, 3), ...(columns.length > 3 ? [`${columns.length - 3} more`] : [])].join(", ");
  return columns.length ? `; not read: ${columns.length === 1 ? "column" : "columns"} ${shown}` : "";
};

/** Format version 1 to 3; floats of 2, 4 or 8 bytes, rows or columns first. */
function readNpy(buffer: ArrayBuffer, dim: number): Dropped {
  const bytes = new Uint8Array(buffer);
  const view = new DataView(buffer);
  if (bytes.length < 12 || bytes[0] !== 0x93 || String.fromCharCode(...bytes.subarray(1, 6)) !== "NUMPY") {
    throw new Error("it is no .npy file");
  }
  const [length, start] = bytes[6] === 1 ? [view.getUint16(8, true), 10] : [view.getUint32(8, true), 12];
  const header = new TextDecoder().decode(bytes.subarray(start, start + length));
  const type = /'descr':\s*'([<>|=])f([248])'/.exec(header);
  const shape = /'shape':\s*\((\d+),\s*(\d+),?\s*\)/.exec(header);
  if (!type || !shape) throw new Error("it must hold floats, cells x numbers");
  const [n, width, size] = [Number(shape[1]), Number(shape[2]), Number(type[2])];
  if (width !== dim) throw mismatch(width, dim);
  if (bytes.length < start + length + n * dim * size) throw new Error("it is cut short");
  const isLittle = type[1] !== ">";
  const read = (position: number) => {
    if (size === 2) return float16(view.getUint16(position, isLittle));
    return size === 4 ? view.getFloat32(position, isLittle) : view.getFloat64(position, isLittle);
  };
  const [rowStep, columnStep] = /'fortran_order':\s*True/.test(header) ? [1, n] : [dim, 1];
  const vectors = new Float32Array(n * dim);
  for (let i = 0; i < n; i++) {
    for (let k = 0; k < dim; k++) vectors[i * dim + k] = read(start + length + size * (i * rowStep + k * columnStep));
  }
  return { vectors, names: null, what: `a matrix of ${n} x ${dim} numbers` };
}

function float16(bits: number): number {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >> 10) & 31;
  const fraction = bits & 1023;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (exponent ? (1 + fraction / 1024) * 2 ** (exponent - 15) : (fraction / 1024) * 2 ** -14);
}

/** A column `embedding` of lists, or `dim` columns of floats. */
async function readParquet(file: ArrayBuffer, dim: number): Promise<Dropped> {
  const compressors = {
    ZSTD: (input: Uint8Array) => decompress(input),
    GZIP: (input: Uint8Array) => gunzipSync(input),
  };
  const metadata = await parquetMetadataAsync(file);
  const fields = parquetSchema(metadata).children.map(({ element }) => element);
  const isList = fields.some(({ name }) => name === "embedding");
  const floats = fields.filter(({ type }) => type === "FLOAT" || type === "DOUBLE").map(({ name }) => name);
  if (!isList && floats.length !== dim) {
    throw new Error(`it has no column 'embedding', and ${floats.length} columns of floats, not ${dim}`);
  }
  const named = NAMES.find((name) => fields.some((field) => field.name === name));
  const columns = [...new Set([...(isList ? ["embedding"] : floats), ...(named ? [named] : [])])];
  const rows = await parquetReadObjects({ file, metadata, columns, compressors });
  const vectors = new Float32Array(rows.length * dim).fill(NaN);
  rows.forEach((row, i) => {
    const values: ArrayLike<number | null> | null = isList ? row.embedding : floats.map((name) => row[name] as number | null);
    if (values && values.length !== dim) throw mismatch(values.length, dim);
    for (let k = 0; values && k < dim; k++) vectors[i * dim + k] = values[k] ?? NaN;
  });
  const others = fields.map(({ name }) => name).filter((name) => !columns.includes(name));
  const what = `${isList ? "column 'embedding'" : `${dim} columns of floats`}${named ? `, names from column '${named}'` : ""}`;
  return {
    vectors,
    names: named ? rows.map((row) => String(row[named])) : null,
    what: what + left(others.map((name) => `'${name}'`)),
  };
}
