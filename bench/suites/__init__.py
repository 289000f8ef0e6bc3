"""The suites: a file NAME.py, or NAME/suite.py, whose `SUITE` is a `bench.common.suite.Suite`, is found by itself."""
