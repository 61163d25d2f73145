"""The checks behind `check_reference`: recorded numbers of the official code against ours."""
