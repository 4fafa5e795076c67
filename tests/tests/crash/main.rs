//! What must come out right although a process dies in the middle of it.
