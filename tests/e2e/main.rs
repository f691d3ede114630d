//! The proxy as a program, a simulator as its backend, real sockets between them. One binary, so that the tests share one build.

mod client;
mod house;
mod keyholders;

mod activity;
mod agents;
mod api_keys;
mod attacks;
mod audit;
mod auth;
mod backends;
mod backstage;
mod bare_door;
mod bodies;
mod commands;
mod devices;
mod door;
mod governed;
mod guesses;
mod h2_client;
mod key_server;
mod keys_by_url;
mod leaving;
mod lists;
mod metrics;
mod policy;
mod privacy;
mod puppet;
mod readme;
mod refused_starts;
mod requester;
mod routes;
mod shutdown;
mod smuggling;
mod streaming;
