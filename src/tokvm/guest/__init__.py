"""Will the guest boot on KVM, and what makes it? Inspection, morphs, overlay and undo: docs/morph.md."""
