// The tab "Your cells": a file to choose, and the answers for its cells.

import { group, mean } from "d3-array";
import { STATUSES } from "./annotator";
import { MOST, save, type Yours } from "./dropped";
import { cellsText, count, percent } from "./format";
import type { Page } from "./page";
import { Bar, Swatch, Table } from "./widgets";

const SHOWN = 25; // labels

export function YourCells({ page }: { page: Page }) {
  const { about, error, reading, vectors, yours } = page;
  if (reading) {
    return (
      <>
        <p class="note">{reading.note}</p>
        <progress max={1} value={reading.share} />
        <button onClick={() => page.update({ reading: null })}>Stop</button>
      </>
    );
  }
  const take = ({ files }: HTMLInputElement) => files?.[0] && void page.take(files[0]);
  return (
    <>
      {error && <p class="error">{error}</p>}
      {yours ? <Answers page={page} yours={yours} /> : (
        <p class="note">
          Drop a CSV, Parquet or .npy file anywhere on the page: a row per cell, {vectors?.raw.dim ?? "its"} numbers of the
          same embedding ({about.facts.Vectors}). The adapter runs here, in the page; nothing leaves this machine.
        </p>
      )}
      <label class="file">
        {vectors ? "Choose a file" : "Unpacking the vectors …"}
        <input type="file" accept=".csv,.tsv,.txt,.parquet,.pq,.npy" onChange={(event) => take(event.currentTarget)} />
      </label>
    </>
  );
}

function Answers({ page, yours }: { page: Page; yours: Yours }) {
  const { about, tree } = page;
  const { answers, node: nodes } = yours;
  const counts = STATUSES.map((_, i) => answers.status.filter((status) => status === i).length);
  const [, , novel, invalid] = counts;
  const shareNovel = novel / Math.max(1, nodes.length - invalid);
  const problems = [...yours.problems].map(([why, cells]) => `${count(cells)} with ${why}`).join(", ");
  const [voters, all] = [page.vectors!.annotator.voters.n, about.annotator.cells];
  return (
    <>
      <h2>{cellsText(nodes.length)} of {yours.file}</h2>
      {shareNovel > 0.3 && (
        <p class="error">
          {percent(shareNovel)} of the cells are like nothing in the reference. Are they vectors of the same embedding?
        </p>
      )}
      <p class="note">
        Read: {yours.what}. {problems && `Left out: ${problems}.`}
        {nodes.length > MOST && ` ${count(MOST)} of the cells are drawn.`}
      </p>
      <p class="note">{STATUSES.flatMap((status, i) => (counts[i] ? `${count(counts[i])} ${status}` : [])).join(", ")}</p>
      <p class="buttons">
        <button id="save-yours" onClick={() => save(yours, about, tree)}>Download as CSV</button>
        <button onClick={() => page.forget()}>Remove</button>
      </p>
      <Levels page={page} yours={yours} />
      <Labels page={page} yours={yours} />
      <p class="note">
        Each label is answered as deep as its probability is at least {about.annotator.confidence}.{" "}
        {all > voters
          ? `${count(voters)} of the reference's ${count(all)} cells vote in this page; in fractal annotate, all of them.`
          : "The votes are those of fractal annotate."}
      </p>
    </>
  );
}

/** How many cells are answered at each level. */
function Levels({ page, yours }: { page: Page; yours: Yours }) {
  const { levels } = page.about;
  const { depth, probability, path } = yours.answers;
  const usable = Math.max(1, path.filter((p) => p >= 0).length);
  const rows = levels.map((level, k) => {
    const answered = [...depth.keys()].filter((row) => depth[row] > k);
    const bar = <Bar share={answered.length / usable} colour="var(--accent)" />;
    const sure = mean(answered, (row) => probability[row * levels.length + k]);
    const share = percent(answered.length / usable);
    return [<>{level}{bar}</>, count(answered.length), share, sure === undefined ? "–" : percent(sure)];
  });
  return <Table kind="parts" caption="Answered" head={["", "Cells", "Share", "Mean prob."]} rows={rows} />;
}

/** The deepest answers with their counts and mean probabilities. */
function Labels({ page, yours }: { page: Page; yours: Yours }) {
  const { tree } = page;
  const { levels } = page.about;
  const { answers, node: nodes } = yours;
  const labels = [...group(nodes.keys(), (row) => nodes[row])].sort((a, b) => b[1].length - a[1].length).slice(0, SHOWN);
  const rows = labels.map(([node, cells]) => {
    const sure = mean(cells, (row) => answers.probability[row * levels.length + tree.depth(node) - 1])!;
    const level = node ? levels[tree.depth(node) - 1] : "";
    const name = <><Swatch colour={tree.nodes[node].colour} />{node ? tree.name(node) : "no answer"} <small>{level}</small></>;
    return [name, count(cells.length), node ? percent(sure) : "–"];
  });
  return <Table kind="parts" caption="Deepest label that can be trusted" head={["", "Cells", "Mean prob."]} rows={rows} />;
}
