from tests.report.conftest import keep_lines

__all__ = ["keep_lines"]
