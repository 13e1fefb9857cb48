"""Run a model's program against trusted tests: confined by the kernel, and judged in another process.

Three processes a program, none of which imports torch or sees the caller's environment:

- the *candidate* executes the untrusted text and then only answers calls of the entry point, with plain data;
- the *judge* never executes that text: it runs the trusted prompt and tests, and asks the candidate for results;
- the *supervisor* keeps the clock, ends everything and hands over the judge's verdict.

So nothing in the candidate's process decides anything: no frame to walk, no test to read, no verdict to print, and no
object with an `__eq__` of its own reaches an assertion.

The children load `roles`, `wire` and `kernel` alone (`python -I -S`), hence these use the standard library sparingly,
and nothing else.
"""

from .run import Outcome, check_isolation, run_program, run_programs

__all__ = ["Outcome", "check_isolation", "run_program", "run_programs"]
