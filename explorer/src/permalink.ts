// The state of the page in the part of its address behind #, which no server is ever sent.

export interface State {
  prefix: number;
  colour: string; // "prefix", "level:2" or "column:0"
  pinned: number | null;
  cell: number | null;
  camera: [number, number, number] | null; // zoom, and where in the map the middle of the screen is
  lasso: number[] | null; // the prefix at which it was drawn, and its corners on the map, x and y in turn
  tab: string;
}

export function write(state: State): string {
  const parts = new URLSearchParams();
  parts.set("prefix", String(Number(state.prefix.toFixed(2))));
  if (state.colour !== "prefix") parts.set("colour", state.colour);
  if (state.pinned !== null) parts.set("type", String(state.pinned));
  if (state.cell !== null) parts.set("cell", String(state.cell));
  if (state.camera) parts.set("view", state.camera.map((value) => value.toFixed(3)).join(","));
  if (state.lasso) parts.set("lasso", state.lasso.map((value) => value.toFixed(3)).join(","));
  if (state.tab !== "types") parts.set("tab", state.tab);
  return `#${parts}`;
}

/** What can't be read is left out: anybody may have written the address. */
export function read(hash: string): Partial<State> {
  const parts = new URLSearchParams(hash.replace(/^#/, ""));
  const numbers = (name: string) => {
    const values = (parts.get(name) ?? "").split(",").map(Number);
    return parts.has(name) && values.every(Number.isFinite) ? values : null;
  };
  const state: Partial<State> = {};
  const [prefix, pinned, cell, view, lasso] = ["prefix", "type", "cell", "view", "lasso"].map(numbers);
  if (prefix) state.prefix = prefix[0];
  if (pinned) state.pinned = pinned[0];
  if (cell) state.cell = cell[0];
  if (view?.length === 3) state.camera = [view[0], view[1], view[2]];
  if (lasso && lasso.length >= 7 && lasso.length % 2 === 1 && lasso.length < 1000) state.lasso = lasso;
  const colour = parts.get("colour");
  if (colour && /^(prefix|level:\d+|column:\d+)$/.test(colour)) state.colour = colour;
  const tab = parts.get("tab");
  if (tab && /^(types|cell|group|yours)$/.test(tab)) state.tab = tab;
  return state;
}
