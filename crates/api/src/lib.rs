//! Wire types and routes.
