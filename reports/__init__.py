"""Report generators: functions `write(runs, out_dir, protocol_ids, *, allow_mixed=False) -> list[Path]`, found by entry
point. They leave `cssbench.errors.RunError` for what must not enter a table, or share one, unless `allow_mixed`."""
