//! Looks at the proxy itself once a second and raises alerts for those who watch. What it looks at is kept elsewhere for other reasons
//! (readiness, metrics), so nothing that serves requests has to know of alerts. What was wrong for less than a second may be missed: it
//! is in the log and in the metrics.

use std::sync::Arc;
use std::time::Duration;

use crate::ledger::{Alert, Reloaded};
use crate::site::Site;

const EVERY: Duration = Duration::from_secs(1);

/// Until the process ends.
pub async fn keep_looking(site: Arc<Site>) {
    let mut lookout = Lookout::new(site);
    loop {
        lookout.look();
        tokio::time::sleep(EVERY).await;
    }
}

/// What was seen at the last look.
struct Lookout {
    site: Arc<Site>,
    audit_writes: bool,
    /// In the pool's order.
    backends_up: Vec<bool>,
    reload_failures: [u64; Reloaded::ALL.len()],
    panics: u64,
}

impl Lookout {
    fn new(site: Arc<Site>) -> Lookout {
        let backends_up = vec![true; site.pool.backends().len()];
        Lookout { site, audit_writes: true, backends_up, reload_failures: Default::default(), panics: 0 }
    }

    fn look(&mut self) {
        let Lookout { site, audit_writes, backends_up, reload_failures, panics } = self;
        let (audit, metrics) = (&site.ledger.audit, &site.ledger.metrics);
        let raise = |alert, over, message: &str| audit.activity().alert(alert, over, message);

        let writes = audit.is_writing();
        if std::mem::replace(audit_writes, writes) != writes {
            match writes {
                true => raise(Alert::AuditUnavailable, true, "the audit can be written again"),
                false => raise(Alert::AuditUnavailable, false, "the audit cannot be written; requests are refused"),
            }
        }
        for (backend, was_up) in site.pool.backends().iter().zip(backends_up) {
            let up = backend.is_up();
            if std::mem::replace(was_up, up) != up {
                let state = if up { "can be reached again" } else { "cannot be reached" };
                raise(Alert::BackendUnreachable, up, &format!("backend {} ({}) {state}", backend.name, backend.url));
            }
        }
        for (what, known) in Reloaded::ALL.into_iter().zip(reload_failures) {
            let failures = metrics.reload_failures(what);
            if std::mem::replace(known, failures) != failures {
                let message = format!("{} not reloaded, the last good one stays; the log says why", what.as_str());
                raise(Alert::ReloadFailed, false, &message);
            }
        }
        let caught = metrics.panics();
        if std::mem::replace(panics, caught) != caught {
            raise(Alert::Panicked, false, "a fault of ours was caught; the log says where");
        }
    }
}
