"""What an index is made of: the facts that `fractal embed` has written beside the vectors."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fractal.base.errors import InputError
from fractal.search.source import space_in


def test_facts_that_are_nested_too_deep(tmp_path: Path):
    column = pa.FixedSizeListArray.from_arrays(pa.array(np.ones(12, np.float32)), 4)
    nested = "[" * 100_000 + "]" * 100_000
    facts = {"checkpoint_sha256": "0", "recipe": "fractal", "prefix": "1", "block_widths": nested}
    pq.write_table(pa.table({"embedding": column}).replace_schema_metadata(facts), tmp_path / "x.parquet")
    with pytest.raises(InputError, match="what it says of its vectors' blocks can't be read"):
        space_in(tmp_path / "x.parquet", "")
