"""Report generators: functions `write(runs, out_dir, protocol_ids) -> list[Path]`, found by entry point."""
