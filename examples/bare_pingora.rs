//! The floor of the bench: Pingora's `HttpProxy` with one fixed upstream and nothing else.
//!
//! What our proxy adds is measured against this program, built with the same profile, so that the difference is our
//! work and not the compiler's. It is an example rather than a crate of its own because it then shares the build of
//! the dependencies. Framework defaults are kept, but for what makes the two comparable: one worker thread, and the
//! allocator of the product.
//!
//! ```text
//! bare_pingora LISTEN UPSTREAM        both host:port; ready when the port accepts
//! ```
use std::process::ExitCode;

use async_trait::async_trait;
use pingora::prelude::{HttpPeer, Result, Server, Session, http_proxy_service};
use pingora::proxy::ProxyHttp;
use pingora::server::configuration::ServerConf;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

struct Bare {
    upstream: String,
}

#[async_trait]
impl ProxyHttp for Bare {
    type CTX = ();

    fn new_ctx(&self) {}

    async fn upstream_peer(&self, _session: &mut Session, _ctx: &mut ()) -> Result<Box<HttpPeer>> {
        Ok(Box::new(HttpPeer::new(self.upstream.as_str(), false, String::new())))
    }
}

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let (Some(listen), Some(upstream), None) = (arguments.next(), arguments.next(), arguments.next()) else {
        eprintln!("usage: bare_pingora LISTEN UPSTREAM");
        return ExitCode::from(64);
    };
    let conf = ServerConf {
        threads: 1,
        // The whole pool of the load's connections, as in the configurations of nginx and HAProxy.
        upstream_keepalive_pool_size: 512,
        ..ServerConf::default()
    };
    let mut server = Server::new_with_opt_and_conf(None, conf);
    server.bootstrap();
    let mut service = http_proxy_service(&server.configuration, Bare { upstream });
    service.add_tcp(&listen);
    server.add_service(service);
    server.run_forever()
}
