"""What operators watch: dashboards, rules, alerts and their runbook, and a Prometheus beside a local server."""
