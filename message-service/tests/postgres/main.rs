//! The store on a PostgreSQL server that is killed, frozen, full, or set up to forget. Each test
//! has a server of its own.

mod broken;
mod refused;
mod world;
