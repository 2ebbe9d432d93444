//! Statistics over plain slices.
