//! The proxy as a program, a simulator as its backend, real sockets between them. One binary, so that the tests share one build.

mod client;
mod house;

mod governed;
