"""Homework from the instructor's side: what an exercise is, how submissions are run, judged and reported."""
