"""Models as commands need them: dense ones opened and described, their pairs, compact ones written and checked."""
