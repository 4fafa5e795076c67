//! What things are called in RabbitMQ. Every name begins with the deployment's, so that two
//! deployments can share a virtual host.

/// Names of subscriptions that would collide with queues of our own.
pub const RESERVED: [&str; 2] = ["acknowledge", "mark"];

/// The names of one deployment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Names {
    deployment: String,
}

impl Names {
    /// The names of this deployment.
    pub fn new(deployment: impl Into<String>) -> Self {
        Self {
            deployment: deployment.into(),
        }
    }

    /// The queue of a subscription.
    pub fn queue(&self, subscription: &str) -> String {
        format!("{}.{subscription}", self.deployment)
    }

    /// Where consumers put their answers.
    pub fn acknowledge(&self) -> String {
        self.queue("acknowledge")
    }

    /// The queue whose arguments say which store owns the names.
    pub fn mark(&self) -> String {
        self.queue("mark")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_begins_with_the_deployment() {
        let names = Names::new("shop");
        assert_eq!(names.queue("accounting"), "shop.accounting");
        for reserved in RESERVED {
            assert!([names.acknowledge(), names.mark()].contains(&names.queue(reserved)));
        }
    }
}
