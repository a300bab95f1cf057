//! Fake guest.
