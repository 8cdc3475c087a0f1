"""Generated blocks of Markdown files: what stands between two markers is replaced, the rest stays."""


def with_block(page: str, block: str, *, start: str, end: str) -> str:
    """The page with everything between the markers replaced.

    Raises:
        ValueError: a marker is missing.
    """
    before, found_start, rest = page.partition(start)
    _, found_end, after = rest.partition(end)
    if not found_start or not found_end:
        raise ValueError(f"the page has no {start} ... {end}")
    return f"{before}{start}\n{block}\n{end}{after}"
