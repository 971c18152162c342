//! The tree itself: how its files depend on each other, and how its texts read.

mod prose;
mod structure;
