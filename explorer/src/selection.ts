// A group of cells, and the rule that made it.

export interface Selection {
  rows: [number[], number[]]; // of the cells of the page, and of those that were dropped
  rule: string;
}

/** How the next selection and the one before become one. */
export const MODES = { new: "starts anew", or: "adds", not: "takes away", and: "keeps what is in both" } as const;
export type Mode = keyof typeof MODES;

export function combine(before: Selection | null, next: Selection, mode: Mode): Selection {
  if (!before || mode === "new") return next;
  const rows = [0, 1].map((layer) => {
    const [first, second] = [before.rows[layer], new Set(next.rows[layer])];
    if (mode === "or") return [...new Set([...first, ...second])].sort((a, b) => a - b);
    return first.filter((row) => second.has(row) === (mode === "and"));
  });
  const word = { or: "or", not: "but not", and: "and" }[mode];
  return { rows: rows as [number[], number[]], rule: `(${before.rule}) ${word} (${next.rule})` };
}
