"""Running a package: what its receiver needs, with nothing of the build."""
