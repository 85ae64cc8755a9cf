"""Coverage-guided fuzzing of the image readers: `python -m fuzz TARGET --seconds 300`, `python -m fuzz --replay`.

    corpus/TARGET/…  ─► Windows.expand ─► a file in memory ─► the reader ─► checks     `windows`, `memory`, `targets`, `checks`
          ▲                                                                  anything but an ImageError is a finding
          └── kept: what reached new code, smallest first  ◄── libFuzzer (atheris) ◄── mutations, checksums repaired  `mutation`

An input holds the bytes of an image's structures and the file's size; what lies between is zeros. So inputs are of some hundred
bytes, and so is the corpus. Only fuzzing needs atheris (requirements/fuzz.txt); replaying needs nothing.
"""
