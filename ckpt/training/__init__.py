"""How `ckpt/demo` is made: songs are composed and synthesised, then both networks learn them. See docs/demo.md."""
